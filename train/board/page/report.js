// Charts from the JSON beside them, and films whose frame a slider picks. Nothing is fetched, but by a page that is served.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 200;
const MARGIN = { left: 50, right: 12, top: 8, bottom: 24 };

function element(name, attributes = {}, parent = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

function readable(value) {
  if (value === null || value === undefined) return "not finite";
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return `${+value.toPrecision(4)}`;
}

// Round numbers between two ends: 1, 2 or 5 times a power of ten; on a logarithmic axis the powers, or these too.
function ticks(low, high, logarithmic, wanted) {
  const found = [];
  if (logarithmic) {
    const steps = Math.log10(high / low) > 2 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of steps) found.push(step * 10 ** power);
    const inside = found.filter((tick) => tick >= low && tick <= high);
    if (inside.length >= 2) return inside.filter((_, i) => i % Math.ceil(inside.length / 5) === 0);
    found.length = 0;
  }
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) found.push(+tick.toPrecision(12));
  return found;
}

// Running mean that forgets, without the bias of its start.
function smoothed(points, weight) {
  let mean = 0, total = 0;
  return points.map(([x, y]) => {
    if (y === null) return [x, null];
    mean = weight * mean + (1 - weight) * y;
    total = weight * total + (1 - weight);
    return [x, mean / total];
  });
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.content = JSON.parse(figure.querySelector("script").textContent);
    this.svg = element("svg", { role: "img", "aria-label": this.content.title }, figure);
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    figure.append(this.tip);
    this.legend();
    this.svg.addEventListener("pointermove", (event) => this.hover(event));
    this.svg.addEventListener("pointerdown", (event) => this.hover(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
  }

  legend() {
    const legend = document.createElement("div");
    legend.className = "legend";
    const several = this.content.lines.length > 1;
    this.content.lines.forEach((line, number) => {
      const entry = document.createElement("span");
      const last = line.points.map(([, y]) => y).filter((y) => y !== null).at(-1);
      const dot = document.createElement("i");
      dot.style.background = `var(--c${number % 8})`;
      entry.append(dot, several ? `${line.name} ${readable(last)}` : readable(last));
      legend.append(entry);
    });
    this.figure.append(legend);
  }

  // Axes that hold every finite point and every band.
  measure(logarithmic) {
    const lines = this.content.lines;
    const points = lines.flatMap((line) => line.points.filter(([, y]) => y !== null));
    const bands = lines.flatMap((line) => line.band || []);
    const ys = [...points.map(([, y]) => y), ...bands.flatMap(([, low, high]) => [low, high])];
    const positive = ys.filter((y) => y > 0);
    this.logarithmic = logarithmic && this.content.logarithmic && positive.length > 0;
    let [low, high] = extent(this.logarithmic ? positive : ys);
    if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
    if (!this.logarithmic) {
      const air = (high - low) * 0.06;
      [low, high] = [low >= 0 ? Math.max(0, low - air) : low - air, high + air];
    }
    const right = Math.max(1, ...points.map(([x]) => x));
    this.axes = { left: 0, right, low, high };
  }

  x(value) {
    const { left, right } = this.axes;
    return MARGIN.left + ((value - left) / (right - left)) * (this.width - MARGIN.left - MARGIN.right);
  }

  y(value) {
    const scale = this.logarithmic ? (v) => Math.log(Math.max(v, this.axes.low)) : (v) => v;
    const [low, high] = [scale(this.axes.low), scale(this.axes.high)];
    return HEIGHT - MARGIN.bottom - ((scale(value) - low) / (high - low)) * (HEIGHT - MARGIN.bottom - MARGIN.top);
  }

  path(points) {
    let text = "", pen = "M";
    for (const [x, y] of points) {
      if (y === null) { pen = "M"; continue; }
      text += `${pen}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
      pen = "L";
    }
    return text;
  }

  draw(weight, logarithmic) {
    this.width = this.svg.clientWidth;
    if (!this.width) return; // folded away
    this.measure(logarithmic);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.replaceChildren();
    this.drawAxes();
    this.content.lines.forEach((line, number) => {
      const color = `stroke: var(--c${number % 8})`;
      if (line.band && line.band.length > 1) this.drawBand(line.band, number);
      if (line.band && line.band.length === 1) this.drawBar(line.band[0], number);
      if (weight > 0) element("path", { d: this.path(line.points), class: "raw", style: color }, this.svg);
      element("path", { d: this.path(smoothed(line.points, weight)), class: "curve", style: color }, this.svg);
      const finite = line.points.filter(([, y]) => y !== null);
      for (const [x, y] of finite.length <= 12 ? finite : [])
        element("circle", { cx: this.x(x), cy: this.y(y), r: 2.6, style: `fill: var(--c${number % 8})` }, this.svg);
    });
    this.cursor = element("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" }, this.svg);
  }

  drawAxes() {
    const { left, right, low, high } = this.axes;
    for (const tick of ticks(low, high, this.logarithmic, 4)) {
      element("line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: this.y(tick), y2: this.y(tick) }, this.svg);
      element("text", { x: MARGIN.left - 7, y: this.y(tick) + 4, "text-anchor": "end" }, this.svg).textContent = readable(tick);
    }
    for (const tick of ticks(left, right, false, Math.max(2, Math.floor(this.width / 110)))) {
      const at = { x: Math.min(this.x(tick), this.width - MARGIN.right - 8), y: HEIGHT - 6, "text-anchor": "middle" };
      element("text", at, this.svg).textContent = readable(tick);
    }
  }

  drawBand(band, number) {
    const upper = band.map(([x, , high]) => [x, high]);
    const lower = band.map(([x, low]) => [x, low]).reverse();
    const outline = `${this.path(upper)}${this.path(lower).replace("M", "L")}Z`;
    element("path", { d: outline, class: "band", style: `fill: var(--c${number % 8})` }, this.svg);
  }

  drawBar([x, low, high], number) {
    const at = { x1: this.x(x), x2: this.x(x), y1: this.y(low), y2: this.y(high) };
    element("line", { ...at, class: "bar", "stroke-width": 2, style: `stroke: var(--c${number % 8})` }, this.svg);
  }

  hover(event) {
    const box = this.svg.getBoundingClientRect();
    const { left, right } = this.axes;
    const share = (event.clientX - box.left - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
    const wanted = left + share * (right - left);
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
    const x = nearest(this.content.lines.flatMap((line) => line.points))[0];
    this.tip.replaceChildren(`${x.toLocaleString("en")} samples`);
    this.content.lines.forEach((line, number) => {
      const [at, y] = nearest(line.points);
      if (Math.abs(at - x) > (right - left) / 50) return;
      const row = document.createElement("div");
      row.style.color = `var(--c${number % 8})`;
      const ends = (line.band || []).find(([where]) => where === at);
      row.textContent = `${line.name} ${readable(y)}${ends ? ` (${readable(ends[1])} – ${readable(ends[2])})` : ""}`;
      this.tip.append(row);
    });
    this.cursor.setAttribute("x1", this.x(x));
    this.cursor.setAttribute("x2", this.x(x));
    this.cursor.setAttribute("visibility", "visible");
    this.tip.hidden = false;
    const offset = this.x(x) + this.svg.offsetLeft;
    const room = this.figure.clientWidth - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(4, Math.min(offset + 10, room))}px`;
    this.tip.style.top = `${this.svg.offsetTop + MARGIN.top}px`;
  }

  leave() {
    this.tip.hidden = true;
    this.cursor.setAttribute("visibility", "hidden");
  }
}

function startFilm(figure) {
  const frames = [...figure.querySelectorAll("img")];
  const window_ = figure.querySelector(".frames");
  window_.addEventListener("click", () => window_.classList.toggle("whole"));
  const slider = figure.querySelector("input");
  if (!slider) return;
  const [output, button] = [figure.querySelector("output"), figure.querySelector("button")];
  let timer = 0;
  const show = () => {
    frames.forEach((frame, number) => { frame.hidden = number !== +slider.value; });
    output.textContent = `${(+frames[slider.value].dataset.seen).toLocaleString("en")} samples`;
    figure.querySelectorAll(".moments button").forEach((moment, number) => {
      moment.ariaPressed = String(number === +slider.value);
    });
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    button.textContent = "▶";
  };
  slider.addEventListener("input", () => { stop(); show(); });
  const moments = frames.map((frame, number) => { // all of them side by side, which grows with the run
    const [moment, image] = ["button", "i"].map((name) => document.createElement(name));
    moment.type = "button";
    image.style.backgroundImage = `url("${frame.src}")`;
    image.style.aspectRatio = `${frame.getAttribute("width")} / ${frame.getAttribute("height")}`;
    moment.append(image, (+frame.dataset.seen).toLocaleString("en"));
    moment.addEventListener("click", () => { stop(); slider.value = number; show(); });
    return moment;
  });
  figure.querySelector(".moments").append(...moments);
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (+slider.value === frames.length - 1) slider.value = 0;
    else slider.value = +slider.value + 1;
    show();
    button.textContent = "❚❚";
    timer = setInterval(() => {
      if (+slider.value === frames.length - 1) return stop();
      slider.value = +slider.value + 1;
      show();
    }, 500);
  });
  show();
}

const charts = [...document.querySelectorAll(".chart")].map((figure) => new Chart(figure));
const [smooth, logarithmic] = ["smooth", "logarithmic"].map((id) => document.getElementById(id));

function drawAll() {
  for (const chart of charts) {
    const quiet = chart.figure.closest("#quality"); // few points, each with its interval: nothing to smooth
    chart.draw(quiet || !smooth ? 0 : +smooth.value, !logarithmic || logarithmic.checked);
  }
}

smooth?.addEventListener("input", drawAll);
logarithmic?.addEventListener("change", drawAll);
addEventListener("resize", drawAll);
document.querySelectorAll("details.group").forEach((group) => group.addEventListener("toggle", drawAll));
document.querySelectorAll(".film").forEach(startFilm);
drawAll();

// A page that is served loads itself again when its server has a newer one.
const live = document.getElementById("live");
if (live) setInterval(async () => {
  try {
    const version = await (await fetch("version")).text();
    live.textContent = "it follows the run";
    if (version !== live.dataset.version) location.reload();
  } catch {
    live.textContent = "its server has ended";
  }
}, 3000);
