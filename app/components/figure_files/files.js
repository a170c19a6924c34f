// Makes a file of a figure: plotly.js draws it once more, for paper. Data text enters only as text nodes and attribute values.
const SVG = "http://www.w3.org/2000/svg", FONT = "Arial, Helvetica, 'Liberation Sans', sans-serif", INK = "#111111", CELLS = 20_000;
const round = (x) => Number(x.toFixed(3));
let loading;

function plotly() {
  if (window.Plotly) return Promise.resolve(window.Plotly); // a report brings its own
  loading ??= new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = "/plotly.min.js";
    script.onload = () => done(window.Plotly);
    script.onerror = () => { loading = undefined; failed(new Error("plotly.js did not come")); };
    document.head.append(script);
  });
  return loading;
}

// A caption in lines no wider than `width`; a word that is wider is cut.
function wrapped(text, width, font) {
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `${font}px ${FONT}`;
  const fits = (line) => pen.measureText(line).width <= width;
  const lines = [""];
  for (let word of text.split(" ")) {
    if (fits(`${lines.at(-1)} ${word}`.trim())) { lines.push(`${lines.pop()} ${word}`.trim()); continue; }
    while (!fits(word)) {
      let n = 1;
      while (fits(word.slice(0, n + 1))) n += 1;
      lines.push(word.slice(0, n));
      word = word.slice(n);
    }
    lines.push(word);
  }
  return lines.filter((line) => line !== "");
}

const shape = (z) => (z.shape ? z.shape.split(",").map(Number) : [z.length, z[0].length]);

// Plotly draws a heatmap as a picture of screen pixels; up to CELLS, if no narrower than a pixel, become rectangles, sharp at any size. Colours are read off the picture.
async function sharpened(svg, traces) {
  const pictures = svg.querySelectorAll(".hm image");
  for (const [i, trace] of traces.filter((t) => t.type === "heatmap").entries()) {
    const [rows, columns] = shape(trace.z), drawn = pictures[i];
    if (!drawn || rows * columns > CELLS) continue;
    const picture = new Image();
    picture.src = drawn.getAttribute("href") ?? drawn.getAttribute("xlink:href");
    await picture.decode();
    const canvas = document.createElement("canvas"), [w, h] = [(canvas.width = picture.naturalWidth), (canvas.height = picture.naturalHeight)];
    if (columns > w || rows > h) continue;
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.drawImage(picture, 0, 0);
    const pixels = pen.getImageData(0, 0, w, h).data;
    const [x, y, width, height] = ["x", "y", "width", "height"].map((name) => Number(drawn.getAttribute(name)));
    const [dx, dy, gap] = [width / columns, height / rows, trace.xgap ? 0.5 : 0], group = made("g", {});
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      const at = 4 * (Math.floor(((r + 0.5) * h) / rows) * w + Math.floor(((c + 0.5) * w) / columns));
      if (pixels[at + 3] === 0) continue;
      const fill = `rgb(${pixels[at]},${pixels[at + 1]},${pixels[at + 2]})`, seam = gap ? {} : { stroke: fill, "stroke-width": 0.2 };
      group.append(made("rect", { x: round(x + c * dx + gap), y: round(y + r * dy + gap), width: round(dx - 2 * gap), height: round(dy - 2 * gap), fill, ...seam }));
    }
    drawn.replaceWith(group);
  }
}

// White paper, dark ink, one size of text; an axis keeps what its figure set.
function forPaper({ data, layout }, width, height, font) {
  const axis = { automargin: true, gridcolor: "#e2e2e2", zerolinecolor: "#bbbbbb", linecolor: "#777777", ticks: "outside", ticklen: 3, tickcolor: "#777777" };
  const scaled = (pixels) => ((pixels ?? 0) * font) / 12; // a figure's 12 is the paper's font
  const smaller = (own) => (own.tickfont ? { tickfont: { ...own.tickfont, size: scaled(own.tickfont.size) } } : {});
  const styled = (own = {}) => ({ ...axis, ...flat, ...own, ...smaller(own), title: { ...own.title, standoff: font / 2, font: { size: font } } });
  const flat = data.some((t) => t.type === "heatmap") ? { showgrid: false, zeroline: false } : {}; // a grid would show between the cells
  const said = (layout.annotations || []).map((a) => ({ ...a, yshift: scaled(a.yshift), font: { ...a.font, size: font, color: "#555555" } }));
  const lying = (bar) => (bar.orientation === "h" ? { len: scaled(bar.len), thickness: scaled(bar.thickness), ypad: scaled(bar.ypad) } : {});
  const bars = data.map((t) => (t.colorbar ? { ...t, colorbar: { ...t.colorbar, ...lying(t.colorbar), outlinewidth: 0.5, title: { ...t.colorbar.title, font: { size: font } } } } : t));
  const page = { ...layout, width, height, autosize: false, annotations: said, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", font: { family: FONT, size: font, color: INK },
    margin: { l: font, r: font, t: data.some((t) => t.colorbar?.orientation === "h") ? scaled(layout.margin.t) : font, b: font }, xaxis: styled(layout.xaxis), yaxis: styled(layout.yaxis) };
  return { data: bars, layout: page };
}

const made = (name, attributes, text) => {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};

// The figure as an SVG document: { text, width, height } in CSS pixels.
async function drawn(data) {
  const figure = JSON.parse(data.figure), pad = data.font, small = 0.9 * data.font;
  const screen = document.querySelector(data.place)?.getBoundingClientRect();
  const width = data.width ?? screen?.width ?? 900;
  const lines = data.captioned ? wrapped(data.caption, width - 2 * pad, small) : [];
  const under = lines.length ? lines.length * 1.3 * small + pad : 0;
  const tall = (figure.layout.height * data.font) / 12, column = figure.layout.yaxis?.scaleanchor ? Math.min(tall, width) : tall; // squares need no more
  const body = data.height ? data.height - under : data.width ? column : screen?.height ?? figure.layout.height;
  const Plotly = await plotly();
  const source = await Plotly.toImage(forPaper(figure, width, body, data.font), { format: "svg", width, height: body, imageDataOnly: true });
  const svg = new DOMParser().parseFromString(source, "image/svg+xml").documentElement, height = body + under;
  const inches = data.width && !data.height;
  svg.setAttribute("width", inches ? `${round(width / 96)}in` : round(width));
  svg.setAttribute("height", inches ? `${round(height / 96)}in` : round(height));
  svg.setAttribute("viewBox", `0 0 ${round(width)} ${round(height)}`);
  await sharpened(svg, figure.data);
  svg.prepend(made("title", {}, data.name), made("desc", {}, data.caption), made("metadata", {}, data.about),
    made("rect", { x: 0, y: 0, width, height, fill: "#ffffff" }));
  lines.forEach((line, i) => svg.append(made("text", { x: pad, y: body + (i + 0.8) * 1.3 * small, "font-family": FONT, "font-size": small, fill: INK }, line)));
  return { text: new XMLSerializer().serializeToString(svg), width, height };
}

// JSON in ASCII: no character of a name can be one that XML or a reader of PNG refuses.
const ascii = (value) => JSON.stringify(value).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => { for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1; return n; });
const crc = (bytes) => ~bytes.reduce((c, b) => TABLE[(c ^ b) & 255] ^ (c >>> 8), -1) >>> 0;
const big = (...numbers) => numbers.flatMap((n) => [n >>> 24, (n >>> 16) & 255, (n >>> 8) & 255, n & 255]);
const utf8 = (text) => [...new TextEncoder().encode(text)];

// One chunk of a PNG file: length, type, content, checksum.
function chunk(type, content) {
  const named = Uint8Array.from([...utf8(type), ...content]);
  return Uint8Array.from([...big(content.length), ...named, ...big(crc(named))]);
}

// The picture as a PNG at data.dpi, with its size on paper and its metadata behind the header.
async function painted(data, about) {
  const { text, width, height } = await drawn(data), scale = data.dpi / 96;
  const address = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  const picture = new Image();
  picture.src = address;
  await picture.decode();
  URL.revokeObjectURL(address);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  const plain = new Uint8Array(await (await new Promise((done) => canvas.toBlob(done, "image/png"))).arrayBuffer());
  const metre = Math.round(data.dpi / 0.0254), header = 33; // signature and IHDR
  const told = { Title: data.name, Description: data.caption, Software: data.software, ...(about.url ? { Source: about.url } : {}), routerscope: ascii(about) };
  const texts = Object.entries(told).map(([key, value]) => chunk("iTXt", [...utf8(key), 0, 0, 0, 0, 0, ...utf8(value)]));
  return [plain.slice(0, header), chunk("pHYs", [...big(metre, metre), 1]), ...texts, plain.slice(header)];
}

// Gives the figure to the person as a file, "svg" or "png".
async function saveFigure(data, kind) {
  const about = { ...JSON.parse(data.about), ...(data.query === undefined ? {} : { url: `${location.origin}${location.pathname}?${data.query}` }) };
  const parts = kind === "svg" ? [(await drawn({ ...data, about: ascii(about) })).text] : await painted({ ...data, about: ascii(about) }, about);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(parts, { type: kind === "svg" ? "image/svg+xml" : "image/png" }));
  link.download = `${data.name}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

export default function ({ data, parentElement }) {
  const said = parentElement.querySelector(".said"), buttons = [...parentElement.querySelectorAll("button")];
  for (const button of buttons) {
    button.onclick = async () => {
      said.textContent = "Drawing …";
      for (const b of buttons) b.disabled = true;
      try {
        await saveFigure(data, button.className);
        said.textContent = "";
      } catch (error) {
        console.error(error);
        said.textContent = "This browser could not draw the figure. Reload the page and try again.";
      } finally {
        for (const b of buttons) b.disabled = false;
      }
    };
  }
}
