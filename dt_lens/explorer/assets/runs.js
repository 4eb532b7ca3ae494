"use strict";
// What a page does with its process: opens the stream, starts and stops runs, and draws what comes.
(function () {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const tab = Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");
  let source = null; // the tab's one stream
  let run = null; // what is known of the latest run
  let count = 0;

  const at = (id) => document.getElementById(id);
  const number = (v, digits) => (v === null || v === undefined ? "–" : v.toLocaleString("en", {
    minimumFractionDigits: digits, maximumFractionDigits: digits, useGrouping: true }).replace("-", "−"));
  const signed = (v, digits) => (v === null ? "–" : (v >= 0 ? "+" : "") + number(v, digits));
  const p = (v) => (v === null ? "–" : v < 0.001 ? "< 0.001" : v.toFixed(3));

  function element(name, attributes, ...children) {
    const svg = ["svg", "line", "circle", "rect", "path", "text", "g", "polygon"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    for (const child of children) if (child !== null && child !== undefined) made.append(child);
    return made;
  }

  function say(words) {
    const place = at("live-said");
    if (place) place.textContent = words;
  }

  function busy(on) {
    for (const id of ["live-start", "text-start"]) if (at(id)) at(id).disabled = on;
    if (at("live-stop")) at("live-stop").disabled = !on;
  }

  async function post(what, body) {
    const answer = await fetch(`/run/${tab}/${what}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body || {}),
    });
    if (!answer.ok) return "The explorer does not answer this page any more; open the printed address again.";
    return (await answer.json()).sentence;
  }

  async function opened() {
    const sentence = await post("open");
    if (sentence) return sentence;
    if (source === null || source.readyState === EventSource.CLOSED) {
      source = new EventSource(`/run/${tab}/stream`);
      source.onmessage = (message) => heard(JSON.parse(message.data));
    }
    return "";
  }

  async function begin(wanted) {
    if (run && run.running) return;
    count += 1;
    run = { number: count, kind: wanted.kind, running: true, arms: [], values: {}, history: [], words: "Starting a process …" };
    busy(true);
    clear();
    say(run.words);
    let sentence;
    try {
      sentence = (await opened()) || (await post("start", Object.assign({ run: count }, wanted)));
    } catch (error) {
      sentence = "The explorer does not answer; is dt-lens explore still running?";
    }
    if (sentence) finished(sentence);
  }

  function finished(sentence) {
    run.running = false;
    run.words = sentence;
    busy(false);
    say(sentence);
  }

  function clear() {
    for (const id of ["live-scenes", "live-outcomes", "live-interval", "live-table", "text-next", "text-continued",
      "text-losses", "text-coloured"]) if (at(id)) at(id).replaceChildren();
  }

  function heard(event) {
    if (event.kind === "state") {
      if (run && run.running && event.state === "loading") say("The process of this tab loads the model …");
      return;
    }
    if (!run || (event.run !== undefined && event.run !== run.number && event.why !== "error")) return;
    const todo = { begun, frame, outcome, summary, next, continued, losses, coloured, ended }[event.kind];
    if (["next", "continued", "losses", "coloured"].includes(event.kind)) (run.texts = run.texts || []).push(event);
    if (event.kind === "frame") run.frame = event;
    if (todo) todo(event);
  }

  function ended(event) {
    if (event.why === "error") return finished(event.sentence);
    finished(event.why === "stopped" ? "Stopped." : `Finished in ${number(event.seconds, 1)} s.`);
    root.dataset.ran = String(run.number); // for tests
  }

  function begun(event) {
    Object.assign(run, event, { running: true, scale: event.scale ? `, ${event.scale.trim()}` : "" });
    run.kind = "live";
    for (const arm of event.arms) run.values[arm] = {};
    run.words = `${event.place}`;
    say(`Running: ${event.place}.`);
    scenes();
  }

  // ---- Scenes

  function scenes() {
    const place = at("live-scenes");
    if (!place || place.childElementCount) return;
    for (const arm of run.arms) {
      place.append(element("div", { class: `scene of-${arm}`, id: `scene-${arm}` },
        element("h3", {}, arm), element("svg", { viewBox: "0 0 320 200", role: "img", "aria-label": `${arm} model` }),
        element("p", {}, " ")));
    }
    if (run.place && !run.drawn) place.style.display = run.limit === null ? "none" : "";
  }

  function frame(event) {
    scenes();
    for (const one of event.arms) {
      const scene = at(`scene-${run.arms[one.arm]}`);
      if (!scene) continue;
      const svg = scene.querySelector("svg");
      if (one.picture) {
        svg.replaceChildren(...(one.picture.kind === "body" ? body(one.picture) : grid(one.picture)));
      } else svg.style.display = "none";
      scene.classList.toggle("over", Boolean(one.over));
      const how = one.over ? (one.terminated ? "ended at step" : "ran to step") : "step";
      const carries = one.picture && one.picture.carries ? ` · carries ${one.picture.carries}` : "";
      scene.querySelector("p").textContent =
        `${run.unit} ${event.seed} · ${how} ${number(one.step, 0)} · return ${number(one.total, Math.abs(one.total) < 100 ? 2 : 0)}${carries}`;
    }
  }

  function body(picture) {
    const scale = 90, ground = 180;
    const x = (v) => 160 + (v - picture.at) * scale, y = (v) => ground - v * scale;
    const made = [element("line", { x1: 0, x2: 320, y1: ground, y2: ground, stroke: "var(--line)", "stroke-width": 2 })];
    for (let mark = Math.floor(picture.at) - 3; mark <= picture.at + 3; mark += 1) {
      made.push(element("line", { x1: x(mark), x2: x(mark), y1: ground, y2: ground + 6, stroke: "var(--muted)" }));
      made.push(element("text", { x: x(mark) + 3, y: ground + 16 }, `${mark} m`));
    }
    for (const [x1, z1, x2, z2, r] of picture.parts) {
      made.push(element("line", { x1: x(x1), y1: y(z1), x2: x(x2) + 0.01, y2: y(z2), stroke: "var(--of)",
        "stroke-width": Math.max(3, 2 * r * scale), "stroke-linecap": "round", "stroke-opacity": 0.8 }));
    }
    return made;
  }

  const COLOURS = { red: "#d55e00", green: "#009e73", blue: "#0072b2", purple: "#8c6bd1", yellow: "#c9a227", grey: "#808890",
    R: "#d55e00", G: "#009e73", Y: "#c9a227", B: "#0072b2" };
  const MARKS = { key: "⚷", ball: "●", box: "▣", goal: "★", door: "▥", "door locked": "▦", "door open": "▯", lava: "≈",
    destination: "★", passenger: "☻", stand: "" };

  function grid(picture) {
    const size = Math.min(300 / picture.width, 190 / picture.height);
    const left = (320 - size * picture.width) / 2, top = (200 - size * picture.height) / 2;
    const made = [element("rect", { x: left, y: top, width: size * picture.width, height: size * picture.height,
      fill: "var(--page)", stroke: "var(--line)" })];
    for (const [x, y, what, colour] of picture.cells) {
      const fill = what === "wall" ? "var(--muted)" : COLOURS[colour] || "var(--muted)";
      const box = { x: left + x * size, y: top + y * size, width: size, height: size };
      if (what === "wall") made.push(element("rect", Object.assign({ fill, "fill-opacity": 0.55 }, box)));
      else {
        if (what === "stand" || what === "destination" || what === "goal")
          made.push(element("rect", Object.assign({ fill, "fill-opacity": 0.25 }, box)));
        made.push(element("text", { x: box.x + size / 2, y: box.y + size * 0.72, "text-anchor": "middle",
          style: `font-size:${size * 0.65}px;fill:${fill}` }, MARKS[what] === undefined ? "•" : MARKS[what]));
      }
    }
    for (const [x, y1, y2] of picture.walls)
      made.push(element("line", { x1: left + x * size, x2: left + x * size, y1: top + y1 * size, y2: top + y2 * size,
        stroke: "var(--ink)", "stroke-width": 3 }));
    const [ax, ay, turn] = picture.agent;
    const cx = left + (ax + 0.5) * size, cy = top + (ay + 0.5) * size, r = size * 0.36;
    if (turn === null) made.push(element("rect", { x: cx - r, y: cy - r * 0.7, width: 2 * r, height: 1.4 * r, rx: r * 0.3,
      fill: "var(--of)", "fill-opacity": 0.85 }));
    else made.push(element("polygon", { points: `${r},0 ${-r},${-r * 0.8} ${-r},${r * 0.8}`, fill: "var(--of)",
      transform: `translate(${cx} ${cy}) rotate(${turn * 90})` }));
    return made;
  }

  // ---- Outcomes and intervals

  function outcome(event) {
    run.values[event.arm][event.unit] = event.value;
    outcomes();
  }

  function axes(width, height, low, high, digits, xs, xname, yname) {
    const left = 64, right = 10, top = 22, bottom = 36;
    const made = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": yname });
    const y = (v) => top + (height - top - bottom) * (high - v) / (high - low || 1);
    const x = (i) => left + (width - left - right) * (xs[1] === xs[0] ? 0.5 : (i - xs[0]) / (xs[1] - xs[0]));
    for (let tick = 0; tick <= 4; tick += 1) {
      const value = low + (high - low) * tick / 4;
      made.append(element("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "var(--line)" }),
        element("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, digits)));
    }
    made.append(element("text", { x: 4, y: 12 }, yname),
      element("text", { x: width - right, y: height - 4, "text-anchor": "end" }, xname),
      element("text", { x: left, y: height - 18 }, String(xs[0])),
      element("text", { x: width - right, y: height - 18, "text-anchor": "end" }, String(xs[1])));
    return { made, x, y };
  }

  const decimals = (size) => (size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4);
  const key = (arms) => element("p", { class: "key" }, ...arms.map((arm) => element("span", { class: `of-${arm}` }, arm)));

  function outcomes() {
    const place = at("live-outcomes");
    if (!place) return;
    const units = [...new Set(run.arms.flatMap((arm) => Object.keys(run.values[arm]).map(Number)))].sort((a, b) => a - b);
    const all = run.arms.flatMap((arm) => Object.values(run.values[arm]));
    if (!all.length) return;
    let low = Math.min(...all), high = Math.max(...all);
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    low -= room; high += room;
    const drawn = axes(520, 260, low, high, decimals(Math.max(Math.abs(low), Math.abs(high))),
      [units[0], Math.max(units[units.length - 1], units[0] + 3)], run.unit, `${run.outcome}${run.scale}`);
    for (const arm of run.arms)
      for (const [unit, value] of Object.entries(run.values[arm]))
        drawn.made.append(element("circle", { cx: drawn.x(Number(unit)), cy: drawn.y(value), r: 3.6, fill: "var(--of)",
          "fill-opacity": 0.75, class: `of-${arm}` }));
    place.replaceChildren(drawn.made, key(run.arms));
  }

  function summary(event) {
    run.history.push(event);
    run.latest = event;
    intervals();
    table();
  }

  function intervals() {
    const place = at("live-interval");
    const rows = run.history.filter((one) => one.compared.some((c) => c.low !== null));
    if (!place || !rows.length) return;
    const shown = (one) => one.compared.filter((c) => c.with === "unedited" && c.low !== null);
    const late = rows.slice(Math.min(2, rows.length - 1)); // the first intervals are so wide that nothing else shows
    const bounds = late.flatMap((one) => shown(one).flatMap((c) => [c.low, c.high, c.difference])).concat([0]);
    const room = (Math.max(...bounds) - Math.min(...bounds) || 1) * 0.08;
    const low = Math.min(...bounds) - room, high = Math.max(...bounds) + room;
    const last = rows[rows.length - 1].n;
    const drawn = axes(520, 260, low, high, decimals(Math.max(Math.abs(low), Math.abs(high))), [rows[0].n, Math.max(last, rows[0].n + 1)],
      `${run.unit}s`, `difference from unedited${run.scale}`);
    const inside = (v) => Math.min(high, Math.max(low, v));
    drawn.made.append(element("line", { x1: 64, x2: 510, y1: drawn.y(0), y2: drawn.y(0), stroke: "var(--ink)", "stroke-dasharray": "4 3" }));
    for (const arm of run.arms.filter((one) => one !== "unedited")) {
      const own = rows.map((one) => [one.n, shown(one).find((c) => c.arm === arm)]).filter((pair) => pair[1]);
      if (!own.length) continue;
      const line = own.map(([n, c]) => `${drawn.x(n)},${drawn.y(inside(c.difference))}`);
      const band = [...own.map(([n, c]) => `${drawn.x(n)},${drawn.y(inside(c.high))}`),
        ...own.reverse().map(([n, c]) => `${drawn.x(n)},${drawn.y(inside(c.low))}`)];
      drawn.made.append(element("polygon", { points: band.join(" "), fill: "var(--of)", "fill-opacity": 0.18, class: `of-${arm}` }),
        element("path", { d: `M${line.join("L")}`, stroke: "var(--of)", "stroke-width": 2.2, fill: "none", class: `of-${arm}` }));
    }
    place.replaceChildren(drawn.made, key(run.arms.filter((arm) => arm !== "unedited")));
  }

  function rowsOf(headings, rows, words) {
    const left = words || [0]; // columns of words; the others are numbers
    const cells = (row, tag) => element("tr", {}, ...row.map((cell, i) => element(tag, left.includes(i) ? {} : { class: "number" }, cell)));
    return element("div", { class: "scroll", tabindex: "0" }, element("table", {},
      element("thead", {}, cells(headings, "th")), element("tbody", {}, ...rows.map((row) => cells(row, "td")))));
  }

  function table() {
    const place = at("live-table");
    if (!place || !run.latest) return;
    const { means, compared, n } = run.latest;
    const digits = decimals(Math.max(...Object.values(means).map((one) => Math.abs(one.mean))));
    const first = Object.entries(means).map(([arm, one]) => [arm, number(one.mean, digits),
      ...(one.failed === undefined ? [] : [`${number(100 * one.failed, 0)} %`])]);
    const fine = Math.max(digits, decimals(Math.max(...compared.map((c) => Math.abs(c.difference)))));
    const failing = run.failing && Object.values(means)[0].failed !== undefined;
    place.replaceChildren(
      element("p", {}, `After ${n} paired ${run.unit}s${run.scale}:`),
      rowsOf(["", `mean ${run.outcome}`, ...(failing ? [`failed (${run.failing})`] : [])], first),
      element("p", {}, ""),
      rowsOf(["paired difference", "mean", "95 % interval", "p"], compared.map((c) => [`${c.arm} − ${c.with}`,
        signed(c.difference, fine), c.low === null ? "–" : `${signed(c.low, fine)} to ${signed(c.high, fine)}`, p(c.p)])));
    place.dataset.summary = JSON.stringify(run.latest); // for tests
  }

  // ---- Text

  function next(event) {
    const place = at("text-next");
    if (!place) return;
    const arms = Object.keys(event.arms);
    const length = event.arms[arms[0]].length;
    const rows = [];
    for (let i = 0; i < length; i += 1)
      rows.push([String(i + 1), ...arms.flatMap((arm) => [event.arms[arm][i][0], event.arms[arm][i][1].toFixed(4)])]);
    place.replaceChildren(element("h2", {}, "The next token"),
      rowsOf(["", ...arms.flatMap((arm) => [arm, "probability"])], rows, [0, 1, 3]));
    place.dataset.next = JSON.stringify(event.arms);
  }

  function continued(event) {
    const place = at("text-continued");
    if (!place) return;
    place.append(element("div", { class: `of-${event.arm}` }, element("h3", {}, event.arm),
      element("div", { class: "written" }, element("em", {}, event.prompt), event.text)));
  }

  function losses(event) {
    const place = at("text-losses");
    if (!place) return;
    const rows = Object.entries(event.arms).map(([arm, one]) => [arm, one.loss.toFixed(4), arm === "unedited" ? "–" : one.kl.toFixed(4)]);
    place.replaceChildren(element("h2", {}, "The loss on your text"),
      rowsOf(["", "loss, nats per token", "KL from unedited, nats"], rows),
      ...event.compared.map((c) => element("p", {}, `${c.arm} − ${c.with}: ${signed(c.difference, 4)}` +
        (c.low === null ? "" : ` (95 %: ${signed(c.low, 4)} to ${signed(c.high, 4)})`) + ` over ${event.windows} windows.`)));
    place.dataset.losses = JSON.stringify(event.arms);
  }

  function coloured(event) {
    const place = at("text-coloured");
    if (!place || !event.losses.edited) return;
    const differences = event.losses.edited.map((v, i) => v - event.losses.unedited[i]);
    const most = Math.max(0.1, ...differences.map(Math.abs));
    place.replaceChildren(element("p", { class: "small" },
      "Each token is coloured by how much its loss rises (orange) or falls (blue) with the edits; hover for numbers."),
      element("div", { class: "coloured" }, ...event.tokens.map((token, i) => element("span", {
        title: `${number(event.losses.unedited[i], 2)} → ${number(event.losses.edited[i], 2)} nats`,
        style: `background:color-mix(in srgb, var(--${differences[i] > 0 ? "edited" : "control"}) ${Math.round(70 * Math.abs(differences[i]) / most)}%, transparent)`,
      }, token))));
  }

  // ---- What Dash calls

  function theme(presses) {
    let stored = null;
    try { stored = localStorage.getItem("dt-lens-theme"); } catch (error) { /* storage is off */ }
    let dark = stored === "dark" || (stored !== "light" && system.matches);
    if (presses && presses !== theme.presses) {
      dark = root.dataset.theme !== "dark";
      try { localStorage.setItem("dt-lens-theme", dark ? "dark" : "light"); } catch (error) { /* as above */ }
    }
    theme.presses = presses;
    root.dataset.theme = dark ? "dark" : "light";
    return dark;
  }

  function menu(path) {
    for (const link of document.querySelectorAll("#menu a")) {
      if (new URL(link.href).pathname === path) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    window.scrollTo(0, 0);
    return "";
  }

  // A page that is left and come back to, or drawn in other colours, shows the run again.
  let shown = null;
  function restore() {
    const place = at("live-said");
    if (place === shown) return;
    shown = place;
    if (!run || !place) return;
    busy(run.running);
    say(run.words);
    if (run.kind === "live" && at("live-page")) { scenes(); outcomes(); intervals(); table(); if (run.frame) frame(run.frame); }
    if (run.kind === "text") for (const event of run.texts || []) ({ next, continued, losses, coloured })[event.kind](event);
  }
  new MutationObserver(restore).observe(root, { childList: true, subtree: true });

  function play(presses, edits, units, seed, target, steps, more) {
    const written = String(steps === undefined || steps === null ? "" : steps).trim();
    begin({ kind: "live", edits: edits || [], units, seed, target_return: target === undefined ? null : target,
      max_steps: written === "" ? null : Number.isFinite(Number(written)) ? Number(written) : written,
      control: (more || []).includes("control") ? 0 : null, pace: (more || []).includes("slow") ? 6 : null });
    return "";
  }

  function read(presses, edits, prompt, tokens, text) {
    begin({ kind: "text", edits: edits || [], prompt, tokens, text });
    return "";
  }

  // Not through Dash: React ignores clicks on a button that it has drawn as disabled.
  document.addEventListener("click", (event) => {
    if (event.target.id === "live-stop" && run && run.running)
      post("stop").then((sentence) => { if (sentence) finished(sentence); });
  });

  window.dash_clientside = Object.assign({}, window.dash_clientside, { explorer: { theme, menu, play, read } });
  window.addEventListener("pagehide", () => { if (source) navigator.sendBeacon(`/run/${tab}/close`, ""); });
})();
