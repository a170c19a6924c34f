// Draws the strip and the figures of a report. Data reaches the page through textContent and Plotly's own escaped text.
const report = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

function drawStrip() {
  const place = document.getElementById("strip");
  if (place) tokenStrip({ data: report.strip, parentElement: place, setStateValue: () => {} });
}

async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(plain).text(); // runs only if its hash is the one in the page's policy
  document.head.appendChild(script);
}

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--st-text-color"), line = style.getPropertyValue("--st-border-color");
  const font = { color: ink, family: "system-ui, sans-serif", size: 12 };
  const axis = { automargin: true, gridcolor: line, zerolinecolor: line, linecolor: line };
  return { ...layout, font, autosize: true, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis } };
}

function drawFigures() {
  for (const [name, figure] of Object.entries(report.figures)) {
    const data = structuredClone(figure.data);
    for (const trace of data) if (trace.type === "heatmap") trace.colorscale = report.scales[dark.matches ? "dark" : "light"];
    const saved = { ...figure.file, figure: JSON.stringify({ data: figure.data, layout: figure.layout }), place: "#figure-" + name };
    const buttons = ["SVG", "PNG"].map((kind) => ({ name: "Save as " + kind, icon: Plotly.Icons.camera, click: () => saveFigure(saved, kind.toLowerCase()) }));
    Plotly.react("figure-" + name, data, themed(structuredClone(figure.layout)), { ...figure.config, modeBarButtonsToAdd: buttons, responsive: true });
  }
}

drawStrip();
loadPlotly().then(() => {
  drawFigures();
  dark.addEventListener("change", drawFigures);
}).catch((error) => {
  for (const place of document.querySelectorAll(".plot")) place.textContent = "This browser cannot draw the figures: it is too old, or the file was changed.";
  console.error(error);
});
