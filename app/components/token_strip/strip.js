// The token strip. Everything from data goes through textContent or numbers; no markup is ever built from it.
function bytes(text) { // a loop: Uint8Array.from takes ten times as long
  const plain = atob(text), out = new Uint8Array(plain.length);
  for (let i = 0; i < plain.length; i++) out[i] = plain.charCodeAt(i);
  return out.buffer;
}

function half(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return exponent === 31 ? (fraction ? NaN : sign * Infinity) : sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}

function element(tag, name, text, parent) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}

const GREY_CHIPS = 4; // experts without a hue that have a button; the others are counted together

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.querySelector(".strip");
  if (root.routerscopeId === data.id) return;
  root.routerscopeId = data.id;
  root.replaceChildren();
  root.classList.toggle("compact", data.compact);
  const layers = data.layers.map((l) => ({
    title: l.title, k: l.k, hues: l.hues,
    experts: new Int16Array(bytes(l.experts)),
    weights: l.weights === null ? null : new Uint16Array(bytes(l.weights)), // not stored: experts stand by falling weight
  }));
  const weighted = layers.every((l) => l.weights);
  let at = data.layer, chosen = data.token, spotlight = data.spotlight;
  const timers = {};

  const bar = element("div", "bar", undefined, root);
  const back = element("button", "step", "◀", bar);
  const title = element("span", "title", "", bar);
  const on = element("button", "step", "▶", bar);
  back.setAttribute("aria-label", "previous layer");
  on.setAttribute("aria-label", "next layer");
  const find = element("input", "find", undefined, bar);
  find.type = "search";
  find.placeholder = "find a token";
  find.setAttribute("aria-label", "find a token; Enter steps to the next, Shift and Enter to the one before");
  const count = element("span", "hint count", "", bar);
  count.setAttribute("role", "status");
  const legend = element("div", "legend", undefined, root);
  const text = element("div", "text", undefined, root);
  text.tabIndex = 0;
  text.setAttribute("role", "listbox");
  text.setAttribute("aria-label", "tokens: left and right step through tokens, up goes to the layer before, down to the next");
  const hover = element("div", "hover", "", root);
  hover.setAttribute("aria-live", "polite");
  const path = element("div", "path", undefined, root);
  path.setAttribute("role", "group");
  path.setAttribute("aria-label", "experts of the chosen token, layer by layer");
  if (layers.length > 8) path.tabIndex = 0; // it scrolls

  let line = element("div", "line", undefined, text);
  line.dir = "auto";
  // A token that holds line ends continues on the next line, so a token is a list of spans.
  const spans = data.texts.map((t, i) => {
    const pieces = data.breaks[i] ? t.split(/(?<=⏎)/) : [t];
    return pieces.map((piece) => {
      const span = element("span", "token", piece, line);
      span.setAttribute("role", "option");
      span.dataset.at = i;
      if (data.lost && data.lost[i]) span.classList.add(data.lost[i] === 2 ? "lost" : "partly");
      if (data.breaks[i] && piece.endsWith("⏎")) {
        line = element("div", "line", undefined, text);
        line.dir = "auto";
      }
      return span;
    });
  });

  function choices(i, layer = at) {
    const l = layers[layer], out = [];
    for (let s = 0; s < l.k; s++) out.push([l.experts[i * l.k + s], weighted ? half(l.weights[i * l.k + s]) : 1]);
    return out.filter((c) => c[0] >= 0).sort((a, b) => b[1] - a[1]);
  }

  // An expert's hue is its layer's in the whole run, whatever text is shown.
  function colourOf(layer, e) {
    const place = layers[layer].hues.indexOf(e);
    return place < 0 ? data.other : data.colours[place];
  }

  function describe(i) {
    const found = choices(i).map(([e, w]) => `expert ${e}${weighted ? ` (${w.toFixed(3)})` : ""}`);
    const fate = data.lost ? ["; processed by all of them", "; dropped by some of them", "; dropped by all of them"][data.lost[i]] : "";
    hover.textContent = `token ${i} “${data.texts[i]}” at ${layers[at].title}: ` + (found.join(", ") || "no expert") + fate;
  }

  function follow() {
    path.replaceChildren();
    if (chosen < 0 || data.compact || layers.length < 2) return;
    layers.forEach((l, n) => {
      const mine = choices(chosen, n), hop = element("div", n === at ? "hop here" : "hop", undefined, path);
      const parts = Math.abs(mine.reduce((sum, c) => sum + c[1], 0) - 1) < 0.01; // not every router's weights add up to one
      element("span", "hint", `${l.title} →`, hop);
      for (const [e, w] of mine) {
        const told = parts ? ` (${(100 * w).toFixed(0)}%)` : ` (${w.toFixed(2)})`;
        element("span", "chip", `expert ${e}${weighted ? told : ""}`, hop).style.setProperty("--hue", colourOf(n, e));
      }
      if (!mine.length) element("span", "hint", "no expert", hop);
    });
  }

  function draw() {
    title.textContent = layers[at].title;
    const all = spans.map((_, i) => choices(i)), tops = all.map((mine) => mine[0]);
    const counts = new Map();
    for (const t of tops) if (t) counts.set(t[0], (counts.get(t[0]) || 0) + 1);
    const hued = layers[at].hues, used = (e) => counts.get(e) || 0;
    const colour = (e) => (e === spotlight && !hued.includes(e) ? data.picked : colourOf(at, e));
    spans.forEach((pieces, i) => {
      const mine = all[i], top = tops[i];
      const shown = spotlight === null ? top : mine.find((c) => c[0] === spotlight);
      const strength = !shown ? 0 : spotlight === null ? 0.42 : 0.15 + 0.7 * Math.min(1, shown[1]);
      const share = Math.round(strength * 100);
      for (const span of pieces) {
        span.style.backgroundColor = shown ? `color-mix(in srgb, ${colour(shown[0])} ${share}%, transparent)` : "transparent";
        span.style.borderBottomColor = top ? colour(top[0]) : "transparent";
        span.classList.toggle("chosen", i === chosen);
        span.setAttribute("aria-selected", i === chosen);
      }
    });
    legend.replaceChildren();
    element("span", "hint", "largest weight:", legend);
    const grey = [...counts.keys()].filter((e) => !hued.includes(e)).sort((a, b) => used(b) - used(a) || a - b);
    const chips = [...hued.filter(used), ...grey.slice(0, GREY_CHIPS)];
    if (spotlight !== null && !chips.includes(spotlight)) chips.push(spotlight);
    for (const e of chips) {
      const chip = element("button", "chip", `expert ${e} · ${used(e)}`, legend);
      chip.style.setProperty("--hue", colour(e));
      chip.setAttribute("aria-pressed", spotlight === e);
      chip.onclick = () => { spotlight = spotlight === e ? null : e; draw(); };
    }
    const rest = grey.filter((e) => !chips.includes(e));
    if (rest.length) {
      const chip = element("span", "chip", `${rest.length} ${rest.length === 1 ? "other" : "others"} · ${rest.reduce((n, e) => n + used(e), 0)}`, legend);
      chip.style.setProperty("--hue", data.other);
    }
    follow();
    if (chosen >= 0) describe(chosen);
    else hover.textContent = data.compact ? "" : `Point at a token to see its experts${weighted ? " and gate weights" : ""}; click it to follow it through all layers.`;
  }

  function step(by) {
    const before = at;
    at = Math.min(layers.length - 1, Math.max(0, at + by));
    if (at !== before) spotlight = null; // an expert of another layer is another expert, even with the same number
    draw();
    if (data.tells) later("layer", at, 400); // a held key steps many layers: the page follows when it rests
  }
  function later(name, value, delay) {
    clearTimeout(timers[name]);
    timers[name] = setTimeout(() => setStateValue(name, [data.id, value]), delay);
  }
  function choose(i) {
    if (i < 0 || i >= spans.length) return;
    chosen = i;
    draw();
    spans[i][0].scrollIntoView({ block: "nearest" });
    later("token", i, 60);
  }

  back.onclick = () => step(-1);
  on.onclick = () => step(1);
  text.onclick = (event) => {
    if (event.target.dataset.at === undefined) return;
    choose(Number(event.target.dataset.at));
    path.scrollIntoView({ block: "nearest" });
  };
  text.onmouseover = (event) => { if (event.target.dataset.at !== undefined) describe(Number(event.target.dataset.at)); };
  text.onkeydown = (event) => {
    const moves = {
      ArrowLeft: () => choose(chosen - 1), ArrowRight: () => choose(chosen + 1),
      ArrowUp: () => step(-1), ArrowDown: () => step(1), // layer 0 is on top of every picture
      Home: () => choose(0), End: () => choose(spans.length - 1),
      Escape: () => { spotlight = null; chosen = -1; draw(); },
    };
    if (moves[event.key]) { event.preventDefault(); moves[event.key](); }
  };
  let hits = [], hit = 0;
  function seek(by) {
    const wanted = find.value.toLowerCase();
    const all = wanted === "" ? [] : data.texts.flatMap((t, i) => (t.toLowerCase().includes(wanted) ? [i] : []));
    hit = by && all.length ? (hit + by + all.length) % all.length : 0;
    hits = all;
    const found = new Set(hits);
    spans.forEach((pieces, i) => pieces.forEach((s) => s.classList.toggle("found", found.has(i))));
    spans.forEach((pieces, i) => pieces.forEach((s) => s.classList.toggle("at", i === hits[hit])));
    count.textContent = wanted === "" ? "" : hits.length ? `${hit + 1} of ${hits.length}, Enter for the next` : "no token has it";
    if (hits.length) spans[hits[hit]][0].scrollIntoView({ block: "nearest" });
  }
  find.oninput = () => seek(0);
  find.onkeydown = (event) => { if (event.key === "Enter") seek(event.shiftKey ? -1 : 1); };
  draw();
  if (chosen >= 0) { // within the box: the page stays where it is
    const box = text.getBoundingClientRect(), place = spans[chosen][0].getBoundingClientRect();
    if (place.bottom > box.bottom) text.scrollTop += place.top - box.top - text.clientHeight / 2;
  }
}
