"use strict";
(function () {
  const templates = JSON.parse(document.getElementById("templates").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const PRINTED = 670; // pixels between the margins of a printed page
  let printing = false;

  function specification(id) {
    return JSON.parse(document.getElementById(id).textContent);
  }

  function draw(plot) {
    const wanted = plot.querySelector("select");
    const given = specification(wanted ? wanted.value : plot.dataset.figure);
    const canvas = plot.querySelector(".canvas > div");
    const layout = given.layout;
    plot.querySelector("h3").textContent = given.title;
    plot.querySelector(".about").textContent = given.about;
    canvas.setAttribute("aria-label", [given.title, given.about].join(". "));
    layout.template = templates[dark.matches && !printing ? "dark" : "light"];
    const hints = layout.meta || {};
    canvas.style.setProperty("--least", (hints.least_width || 0) + "px");
    layout.autosize = !printing;
    if (printing) layout.width = PRINTED;
    const width = printing ? PRINTED : canvas.clientWidth;
    const legend = layout.legend || {};
    const shown = given.data.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap");
    if (width < 760 && legend.orientation !== "h" && shown.length > 1) {
      // Beside the plot a legend would leave it no room: below it, and the figure grows by as much as the legend takes.
      const longest = Math.max(...shown.map((trace) => (trace.name || "").length));
      const across = Math.max(1, Math.floor((width - 60) / (7 * longest + 50)));
      const groups = new Set(shown.map((trace) => trace.legendgroup || "")).size;
      const stacked = groups > 1 && groups < shown.length; // groups of several lines each take a row of their own
      const rows = (stacked ? shown.length + groups / 2 : Math.ceil(shown.length / across)) + 1;
      layout.legend = Object.assign({}, legend, {
        orientation: "h", x: 0, xanchor: "left", y: 0, yref: "container", yanchor: "bottom", entrywidth: 7 * longest + 10,
      });
      layout.margin = Object.assign({}, layout.margin, { b: 60 + 21 * rows });
      layout.height += 21 * rows;
    }
    if (width < 620 && hints.labels_above) {
      // Beside the plot long names would leave it no room: above what they name, in rows that are higher by a half.
      const axis = layout.yaxis;
      layout.annotations = axis.tickvals.map((at, row) => ({
        text: axis.ticktext[row].replace("<br>", "&nbsp;&nbsp; "), showarrow: false, font: { size: 12 },
        x: 0, xref: "paper", xanchor: "left", xshift: 2, y: at - 0.4,
      }));
      layout.yaxis = Object.assign({}, axis, { showticklabels: false, ticks: "" });
      layout.height *= 1.4;
      layout.margin.l = 10;
    }
    const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
    return Plotly.react(canvas, given.data, layout, options);
  }

  const plots = Array.from(document.querySelectorAll("figure.plot"));
  const visible = (plot) => !plot.closest("details:not([open])");
  const redraw = () => plots.filter(visible).forEach(draw);

  for (const plot of plots) {
    const select = plot.querySelector("select");
    if (select) select.addEventListener("change", () => draw(plot));
  }
  for (const fold of document.querySelectorAll("details")) {
    fold.addEventListener("toggle", () => {
      if (fold.open) fold.querySelectorAll("figure.plot").forEach(draw);
    });
  }
  dark.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => { printing = true; redraw(); });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });
  let last = window.innerWidth;
  window.addEventListener("resize", () => {
    // Plotly follows the window by itself; only a legend that changes its place needs a new drawing.
    if (!printing && (last < 860) !== (window.innerWidth < 860)) redraw();
    last = window.innerWidth;
  });
  redraw();

  for (const table of document.querySelectorAll("table")) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      head.firstChild.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        const numeric = head.classList.contains("number");
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = Array.from(table.tBodies[0].rows);
        const key = (row) => row.cells[column].dataset.value;
        rows.sort((one, other) => {
          const a = key(one), b = key(other);
          if (a === "" || b === "") return (a === "") - (b === ""); // what is missing stays at the end
          const order = numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
          return down ? -order : order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
