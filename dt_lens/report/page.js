"use strict";
(function () {
  const root = document.documentElement;
  const held = document.getElementById("templates"); // missing on a page without figures
  const templates = held ? JSON.parse(held.textContent) : null;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const PRINTED = 670; // pixels between the margins of a printed page
  const NARROW = 620; // below it long names stand above what they name
  let printing = false;

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const bare = (text) => String(text).replace(/<br>/g, " ").replace(/<[^>]*>/g, "").replace(/&[a-z]+;/g, "x");

  function specification(id) {
    return JSON.parse(document.getElementById(id).textContent);
  }

  // Words in lines of at most `most` letters; markup takes no room.
  function wrapped(text, most) {
    const lines = [];
    for (const part of String(text).split("<br>")) {
      let line = "";
      for (const word of part.split(" ")) {
        if (line && bare(line).length + 1 + bare(word).length > most) {
          lines.push(line);
          line = word;
        } else line = line ? line + " " + word : word;
      }
      lines.push(line);
    }
    return lines;
  }

  // Beside the plot a legend would leave it no room: below it, and the figure grows by as much as the legend takes.
  function legendBelow(given, layout, width) {
    const legend = layout.legend || {};
    const shown = given.data.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap");
    if (width >= 760 || legend.orientation === "h" || shown.length < 2) return;
    const longest = Math.max(...shown.map((trace) => bare(trace.name || "").length));
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

  // Long names beside the plot would leave it no room: above what they name, in rows that are as high as they need.
  function labelsAbove(given, layout, width) {
    const axis = layout.yaxis || {};
    let values = axis.tickvals, texts = axis.ticktext;
    if (!values) {
      const found = new Set();
      given.data.forEach((trace) => (Array.isArray(trace.y) ? trace.y : []).forEach((name) => found.add(name)));
      texts = values = Array.from(found).filter((name) => typeof name === "string");
    }
    if (!values.length) return;
    const lines = texts.map((text) => wrapped(text, Math.floor((width - 30) / 6.6)));
    const most = Math.max(...lines.map((found) => found.length));
    const up = axis.autorange === "reversed" || (axis.range && axis.range[0] > axis.range[1]) ? -1 : 1;
    const named = typeof values[0] === "string";
    const place = (at) => (named ? values.indexOf(at) : at);
    if (!named) {
      // The marks move into the lower half of their row.
      for (const trace of given.data) if (Array.isArray(trace.y)) trace.y = trace.y.map((at) => at - up * 0.2);
    }
    layout.annotations = (layout.annotations || []).concat(values.map((at, row) => ({
      text: lines[row].join("<br>"), showarrow: false, font: { size: 12 }, align: "left",
      x: 0, xref: "paper", xanchor: "left", xshift: 2, y: place(at) + up * 0.5, yanchor: "top",
    })));
    layout.yaxis = Object.assign({}, axis, { showticklabels: false, ticks: "" });
    layout.height = 170 + values.length * (named ? 60 + 30 * most : 26 + 31 * most);
    layout.margin = Object.assign({}, layout.margin, { l: 12 });
    layout.xaxis = Object.assign({}, layout.xaxis, { nticks: 5 });
  }

  // The titles of the axes in lines that fit, of each panel by its share of the figure.
  function titles(layout, width) {
    const high = layout.height - (layout.margin.t || 0) - (layout.margin.b || 0);
    for (const name of Object.keys(layout)) {
      const kind = (/^([xy])axis\d*$/.exec(name) || [])[1];
      const title = kind && (layout[name] || {}).title;
      if (!title || !title.text) continue;
      const [from, to] = layout[name].domain || [0, 1];
      const room = (to - from) * (kind === "x" ? width - 50 : high);
      const text = wrapped(title.text, Math.max(12, Math.floor(room / 8))).join("<br>");
      layout[name] = Object.assign({}, layout[name], { title: Object.assign({}, title, { text: text }) });
    }
  }

  // A table of cells: short names, and no numbers in cells that are narrower than they.
  function heatmap(given, layout, width) {
    const x = layout.xaxis || {}, y = layout.yaxis || {};
    if (!x.ticktext || layout.grid || layout.xaxis2) return;
    const small = width < NARROW;
    const names = (y.ticktext || []).map((name) => (small ? name.replace(/^blocks\.(\d+)\.(attn|mlp)\./, "$1 ").replace(/  <i>.*/, "") : name));
    const left = 12 + 6.8 * Math.max(0, ...names.map((name) => bare(name).length)) + (y.title && y.title.text ? 24 : 0);
    const bar = !small && (layout.coloraxis || {}).showscale !== false ? 90 : 0;
    const cell = (Math.max(width, (layout.meta || {}).least_width || 0) - left - bar - 20) / x.ticktext.length;
    const longest = Math.max(...x.ticktext.map((name) => Math.max(...String(name).split("<br>").map((line) => bare(line).length))));
    if (7.2 * longest > cell - 4 && !x.tickangle) {
      layout.xaxis = Object.assign({}, x, { tickangle: x.side === "top" ? -60 : 60 });
      layout.height += Math.min(140, 5 * longest);
    }
    if (!small) return;
    layout.yaxis = Object.assign({}, y, { ticktext: names, tickfont: { size: 11 }, title: { text: "" } });
    const fits = (width - left - 20) / x.ticktext.length;
    if (fits >= 9) layout.meta.least_width = 0;
    if (fits < 32) {
      for (const trace of given.data) {
        if (Array.isArray(trace.text)) {
          trace.text = trace.text.map((row) => row.map((said) => (said === "●" ? said : /\*/.test(said) ? "*" : "")));
        }
      }
      layout.xaxis = Object.assign({}, layout.xaxis, { tickangle: -90, tickfont: { size: 11 } });
    }
    barsBelow(layout);
  }

  // Scales of colours below the plot, which leaves it the width.
  function barsBelow(layout) {
    for (const axis of ["coloraxis", "coloraxis2"]) {
      if (!layout[axis] || layout[axis].showscale === false) continue;
      const colourbar = Object.assign({}, layout[axis].colorbar, {
        orientation: "h", x: 0, xanchor: "left", y: 0, yref: "container", yanchor: "bottom", lenmode: "fraction", len: 0.9,
        thickness: 10, nticks: 4,
      });
      colourbar.title = Object.assign({}, colourbar.title, { side: "top" });
      layout[axis] = Object.assign({}, layout[axis], { colorbar: colourbar });
      layout.margin = Object.assign({}, layout.margin, { b: (layout.margin.b || 40) + 75 });
      layout.height += 75;
    }
  }

  // Several plots in a row: one below the other where the page is too narrow for the row.
  function stacked(layout, width) {
    const HIGH = 230, BETWEEN = 90, SLACK = 1e-6;
    const names = Object.keys(layout).filter((name) => /^xaxis\d*$/.test(name));
    const panels = names.map((name) => ({ x: name, y: "y" + name.slice(1) }));
    const whole = (domain) => !domain || (domain[0] < SLACK && domain[1] > 1 - SLACK);
    if (panels.length < 2 || !panels.every((one) => layout[one.y] && whole(layout[one.y].domain))) return;
    panels.sort((one, other) => (layout[one.x].domain || [0])[0] - (layout[other.x].domain || [0])[0]);
    const room = panels.length * HIGH + (panels.length - 1) * BETWEEN;
    const first = layout[panels[0].y];
    panels.forEach((one, number) => {
      const x = layout[one.x], y = layout[one.y], old = x.domain || [0, 1];
      const top = 1 - number * (HIGH + BETWEEN) / room, bottom = Math.max(0, top - HIGH / room);
      for (const title of layout.annotations || []) {
        if (title.xref !== "paper" || title.yref !== "paper" || title.showarrow !== false) continue;
        if (Math.abs(title.x - (old[0] + old[1]) / 2) > SLACK || title.y < 1 - SLACK) continue;
        const lines = wrapped(title.text, Math.floor((width - 80) / 7.5)).join("<br>");
        Object.assign(title, { text: lines, x: 0, xanchor: "left", y: top, align: "left" });
      }
      layout[one.x] = Object.assign({}, x, { domain: [0, 1] });
      layout[one.y] = Object.assign({}, y, { domain: [bottom, top] });
      if (y.showticklabels === false && first.showticklabels !== false) {
        const shown = { showticklabels: true, title: y.title && y.title.text ? y.title : first.title };
        if (first.ticktext) Object.assign(shown, { tickvals: first.tickvals, ticktext: first.ticktext });
        Object.assign(layout[one.y], shown);
      }
    });
    layout.height = room + layout.margin.t + layout.margin.b + 20;
    layout.meta.least_width = 0;
  }

  // Several rows of plots: as many beside each other as fit, the rest of each row, or of all rows, below them.
  function folded(layout, width, heat) {
    const LEAST = 125, SLACK = 1e-4, near = (one, other) => Math.abs(one - other) < SLACK;
    const panels = Object.keys(layout).filter((name) => /^xaxis\d*$/.test(name))
      .map((name) => ({ x: name, y: "y" + name.slice(1) }));
    if (!panels.every((one) => layout[one.y] && layout[one.x].domain && layout[one.y].domain)) return;
    const places = (values, sign) => values.sort((a, b) => sign * (a - b)).filter((v, i, all) => !i || !near(v, all[i - 1]));
    for (const one of panels) Object.assign(one, { dx: layout[one.x].domain, dy: layout[one.y].domain });
    const columns = places(panels.map((one) => one.dx[0]), 1), rows = places(panels.map((one) => one.dy[0]), -1);
    if (rows.length < 2 || columns.length < 2) return;
    const old = (layout.meta.least_width - 120) / columns.length;
    const across = Math.min(columns.length, Math.max(1, Math.floor((width - 70) / Math.min(LEAST, old))));
    const bands = Math.ceil(columns.length / across);
    const notes = (layout.annotations || []).filter((one) => one.xref === "paper" && one.yref === "paper");
    const above = (note) => panels.find((one) => near(note.x, (one.dx[0] + one.dx[1]) / 2) && near(note.y, one.dy[1]));
    const beside = notes.filter((one) => one.textangle);
    const each = notes.filter(above).length > columns.length; // a title for each plot, and not for each column
    const high = (panels[0].dy[1] - panels[0].dy[0]) * (layout.height - (layout.margin.t || 80) - (layout.margin.b || 60));
    const line = (r, band) => (each ? r * bands + band : band * rows.length + r);
    const title = beside.length ? 22 : 28, between = each ? 0 : 80; // the axes of a band of rows, and the next one's names
    const top = (r, band) => line(r, band) * (high + title) + (each ? 0 : band * between);
    const room = top(rows.length - 1, bands - 1) + high;
    for (const one of panels) {
      one.r = rows.findIndex((v) => near(v, one.dy[0]));
      one.c = columns.findIndex((v) => near(v, one.dx[0]));
      one.band = Math.floor(one.c / across);
      one.at = one.c % across;
      const from = 1 - top(one.r, one.band) / room;
      one.nx = [(one.at + 0.02) / across, (one.at + 0.98) / across];
      one.ny = [Math.max(0, from - high / room), from];
    }
    const leads = (one) => layout[panels.find((other) => other.r === one.r && other.c === 0).y];
    const axes = panels.map((one) => {
      const lead = leads(one), shown = { showticklabels: one.at === 0 && lead.showticklabels !== false };
      shown.title = one.at === 0 ? lead.title : { text: "" };
      return [one, shown];
    });
    for (const [one, shown] of axes) {
      layout[one.x] = Object.assign({}, layout[one.x], { domain: one.nx });
      layout[one.y] = Object.assign({}, layout[one.y], { domain: one.ny }, shown);
    }
    const moved = [];
    for (const note of layout.annotations || []) {
      const panel = notes.includes(note) && above(note);
      if (panel) {
        Object.assign(note, { x: (panel.nx[0] + panel.nx[1]) / 2, y: panel.ny[1], yshift: beside.length ? 18 : 0 });
        const lines = wrapped(note.text, Math.max(8, Math.floor((width - 70) / across / 6.5)));
        note.text = lines.slice(0, 2).join("<br>");
      } else if (beside.includes(note)) {
        for (const one of panels.filter((p) => p.at === 0 && near(note.y, (p.dy[0] + p.dy[1]) / 2))) {
          moved.push(Object.assign({}, note, {
            x: one.nx[0], xanchor: "left", y: one.ny[1], yanchor: "bottom", textangle: 0, font: { size: 11 },
          }));
        }
        continue;
      }
      moved.push(note);
    }
    layout.annotations = moved;
    layout.height = room + (layout.margin.t || 80) + (layout.margin.b || 60);
    layout.meta.least_width = 0;
    if (heat) barsBelow(layout);
  }

  function leadsTo(point) {
    let at = (point.data.meta || {}).links;
    for (const place of [].concat(point.pointNumber)) if (Array.isArray(at)) at = at[place];
    return typeof at === "string" && at ? at : null;
  }

  function draw(plot) {
    const wanted = plot.querySelector("select");
    const given = specification(wanted ? wanted.value : plot.dataset.figure);
    const frame = plot.querySelector(".canvas");
    const canvas = frame.querySelector("div");
    const layout = given.layout;
    plot.querySelector("h3").textContent = given.title;
    plot.querySelector(".about").textContent = given.about;
    canvas.setAttribute("aria-label", [given.title, given.about].join(". "));
    layout.template = templates[isDark() && !printing ? "dark" : "light"];
    layout.meta = layout.meta || {};
    const width = printing ? PRINTED : frame.clientWidth;
    if (width < NARROW && layout.meta.labels_above) {
      layout.meta.least_width = 0;
      labelsAbove(given, layout, width);
    }
    const heat = given.data.some((trace) => trace.type === "heatmap");
    if ((layout.meta.least_width || 0) > width) stacked(layout, width);
    if ((layout.meta.least_width || 0) > width) folded(layout, width, heat);
    if (heat) heatmap(given, layout, width);
    titles(layout, Math.max(width, layout.meta.least_width || 0));
    legendBelow(given, layout, width);
    const least = printing ? 0 : layout.meta.least_width || 0;
    canvas.style.setProperty("--least", least + "px");
    layout.autosize = false; // drawn anew when the page changes its width, see below
    layout.width = Math.max(width, least);
    plot.classList.toggle("wider", least > width);
    frame.classList.toggle("leads", given.data.some((trace) => trace.meta && trace.meta.links));
    const options = { responsive: false, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
    // Anew each time: a figure whose axes change their kind of labels is not always redrawn correctly in place.
    const drawn = Plotly.newPlot(canvas, given.data, layout, options);
    canvas.on("plotly_click", (event) => {
      const anchor = leadsTo(event.points[0]);
      if (!anchor) return;
      if (location.hash === "#" + anchor) reveal();
      else location.hash = anchor;
    });
    return drawn;
  }

  const plots = Array.from(document.querySelectorAll("figure.plot"));
  const visible = (plot) => !plot.closest("details:not([open])");
  const redraw = () => plots.filter(visible).forEach(draw);

  // Show what a link leads to, though it be folded away.
  function reveal() {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    const table = target.closest("table.short");
    if (table && target.classList.contains("more")) showAll(table, true);
    document.querySelectorAll("tr.found").forEach((row) => row.classList.remove("found"));
    if (target.tagName === "TR") target.classList.add("found");
    target.scrollIntoView({ block: target.tagName === "TR" ? "center" : "start" });
  }

  function showAll(table, all) {
    const button = table.closest("figure").querySelector("button.all");
    table.classList.toggle("whole", all);
    if (!button) return;
    button.dataset.more = button.dataset.more || button.textContent;
    button.textContent = all ? "Show the first " + table.dataset.first : button.dataset.more;
  }

  for (const table of document.querySelectorAll("table.short")) {
    const button = table.closest("figure").querySelector("button.all");
    button.hidden = false;
    button.addEventListener("click", () => showAll(table, !table.classList.contains("whole")));
  }
  for (const plot of plots) {
    const select = plot.querySelector("select");
    if (select) select.addEventListener("change", () => draw(plot));
  }
  for (const fold of document.querySelectorAll("details")) {
    fold.addEventListener("toggle", () => {
      if (fold.open) Array.from(fold.querySelectorAll("figure.plot")).filter(visible).forEach(draw);
    });
  }

  const theme = document.getElementById("theme");
  function named() {
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
  }
  theme.hidden = false;
  named();
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("dt-lens-colours", root.dataset.theme);
    } catch (error) {
      // It holds for this page alone.
    }
    named();
    redraw();
  });
  system.addEventListener("change", () => { named(); redraw(); });
  window.addEventListener("beforeprint", () => { printing = true; redraw(); });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });
  window.addEventListener("hashchange", reveal);
  let last = root.clientWidth, waiting = 0;
  window.addEventListener("resize", () => {
    if (printing || last === root.clientWidth) return;
    last = root.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 120);
  });
  redraw();
  if (location.hash) reveal();

  for (const table of document.querySelectorAll("main table, header table")) {
    if (!table.tHead || !table.tHead.querySelector("button")) continue;
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
        if (table.dataset.first) rows.forEach((row, at) => row.classList.toggle("more", at >= Number(table.dataset.first)));
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
