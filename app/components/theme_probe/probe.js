// Reports "dark" or "light" by the brightness of the page's background; runs again whenever the theme changes.
export default function ({ data, parentElement, setStateValue }) {
  const here = location.pathname.split("/").pop() === data.page; // else the reader has gone on, or back, and the address is another page's
  if (here && data.query !== null && location.search !== `?${data.query}`) history.replaceState(history.state, "", `${location.pathname}?${data.query}`);
  const probe = parentElement.querySelector("i");
  probe.style.color = "var(--st-background-color)";
  const [r, g, b] = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
  const theme = 0.299 * r + 0.587 * g + 0.114 * b < 128 ? "dark" : "light";
  if (theme !== data.drawn) setStateValue("theme", theme);
}
