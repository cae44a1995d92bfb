"use strict";

// Curves: a vertical line under the pointer with the value of every curve.
for (const chart of document.querySelectorAll("svg.chart")) {
  const { box, x, y, curves } = JSON.parse(chart.dataset.reading);
  const [left, top, right, bottom] = box;
  const make = (name, parent, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return parent.appendChild(element);
  };
  const group = make("g", chart, { class: "pointer", visibility: "hidden" });
  const line = make("line", group, { y1: top, y2: bottom });
  const step = make("text", group, { y: bottom + 18, "text-anchor": "middle", style: "fill: var(--muted)" });
  const marks = curves.map((curve) => ({
    dot: make("circle", group, { r: 4, style: `fill: ${curve.colour}` }),
    text: make("text", group, { style: `fill: ${curve.colour}` }),
  }));
  const across = (value) => left + ((value - x[0]) / (x[1] - x[0])) * (right - left);
  const down = (value) => bottom - ((value - y[0]) / (y[1] - y[0])) * (bottom - top);

  chart.addEventListener("pointermove", (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    const wanted = x[0] + ((point.x - left) / (right - left)) * (x[1] - x[0]);
    let nearest = null;
    for (const curve of curves)
      for (const value of curve.x)
        if (nearest === null || Math.abs(value - wanted) < Math.abs(nearest - wanted)) nearest = value;
    if (nearest === null) return;
    const place = across(nearest), flip = place > (left + right) / 2;
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    step.setAttribute("x", place);
    step.textContent = "step " + nearest.toLocaleString("en");
    curves.forEach((curve, i) => {
      const value = curve.y[curve.x.indexOf(nearest)];
      const shown = value !== undefined && value !== null;
      const { dot, text } = marks[i];
      dot.style.display = text.style.display = shown ? "" : "none";
      if (!shown) return;
      const height = Math.max(top, Math.min(bottom, down(value)));
      dot.setAttribute("cx", place);
      dot.setAttribute("cy", height);
      text.setAttribute("x", place + (flip ? -10 : 10));
      text.setAttribute("y", height + (i % 2 ? 16 : -7));
      text.setAttribute("text-anchor", flip ? "end" : "start");
      text.textContent = value >= 1e4 || (value && value < 1e-2) ? value.toPrecision(4) : value.toLocaleString("en", { maximumFractionDigits: 4 });
    });
    group.setAttribute("visibility", "visible");
  });
  chart.addEventListener("pointerleave", () => group.setAttribute("visibility", "hidden"));
}

// Attention: the small pictures are the data; a grey level g stands for a weight of (g / 255)^2.
const attention = document.querySelector(".attention");
if (attention) {
  const size = Number(attention.dataset.size);
  const stage = attention.querySelector(".stage"), enlarged = stage.querySelector(".enlarged");
  const tokens = [...attention.querySelectorAll(".tokens span")];
  const quote = (i) => "“" + tokens[i].dataset.token.replace(/\n/g, "↵") + "”";
  let weights = null, query = size - 1;

  const paint = (key) => {
    const most = Math.max(1e-6, ...tokens.map((_, k) => weights(query, k)));
    tokens.forEach((token, k) => {
      token.style.setProperty("--w", (weights(query, k) / most).toFixed(3));
      token.classList.toggle("query", k === query);
    });
    const cell = 100 / size;
    const row = enlarged.querySelector(".row"), column = enlarged.querySelector(".column");
    Object.assign(row.style, { display: "block", top: query * cell + "%", height: cell + "%" });
    Object.assign(column.style, { display: key === null ? "none" : "block", left: key * cell + "%", width: cell + "%" });
    const share = (k) => (100 * weights(query, k)).toFixed(weights(query, k) < 0.1 ? 1 : 0) + "%";
    let best = 0;
    for (let k = 0; k < size; k++) if (weights(query, k) > weights(query, best)) best = k;
    const at = key === null ? best : key;
    stage.querySelector(".reading").textContent =
      quote(query) + " (" + (query + 1) + ") attends to " + quote(at) + " (" + (at + 1) + ") with " + share(at) + (key === null ? ", the most" : "");
  };

  const choose = (button) => {
    for (const other of attention.querySelectorAll(".heads button")) other.classList.toggle("chosen", other === button);
    const picture = button.querySelector("img");
    stage.querySelector("h3").textContent = button.dataset.name;
    stage.querySelector(".numbers").textContent = button.dataset.numbers;
    enlarged.querySelector("img").src = picture.src;
    picture.decode().then(() => {
      const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(picture, 0, 0);
      const grey = context.getImageData(0, 0, size, size).data;
      weights = (q, k) => (grey[4 * (q * size + k)] / 255) ** 2;
      paint(null);
    });
  };

  for (const button of attention.querySelectorAll(".heads button")) button.addEventListener("click", () => choose(button));
  enlarged.addEventListener("pointermove", (event) => {
    const frame = enlarged.getBoundingClientRect();
    const cell = (offset, length) => Math.max(0, Math.min(size - 1, Math.floor((offset / length) * size)));
    query = cell(event.clientY - frame.top, frame.height);
    if (weights) paint(cell(event.clientX - frame.left, frame.width));
  });
  tokens.forEach((token, i) => token.addEventListener("pointerenter", () => { query = i; if (weights) paint(null); }));
  const first = attention.querySelector(".heads button");
  if (first) choose(first);
}

// Teacher and student: what both give the key under the pointer.
const spoken = document.querySelector("#pairs .reading");
if (spoken) {
  const tokens = JSON.parse(spoken.dataset.tokens), size = tokens.length;
  const quote = (i) => "“" + tokens[i].replace(/\n/g, "↵") + "” (" + (i + 1) + ")";
  const levels = new Map();  // picture -> its grey levels, once it has been pointed at
  const level = (picture, q, k) => {
    if (!levels.has(picture)) {
      const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(picture, 0, 0);
      levels.set(picture, context.getImageData(0, 0, size, size).data);
    }
    return levels.get(picture)[4 * (q * size + k)];
  };
  for (const both of document.querySelectorAll(".both")) {
    const pictures = [...both.querySelectorAll("img")];
    for (const picture of pictures)
      picture.addEventListener("pointermove", (event) => {
        const frame = picture.getBoundingClientRect();
        const cell = (offset, length) => Math.max(0, Math.min(size - 1, Math.floor((offset / length) * size)));
        const q = cell(event.clientY - frame.top, frame.height), k = cell(event.clientX - frame.left, frame.width);
        const [student, teacher] = pictures.map((p) => (100 * (level(p, q, k) / 255) ** 2).toFixed(1) + "%");
        spoken.textContent = quote(q) + " attends to " + quote(k) + ": student " + student + ", teacher " + teacher;
      });
  }
}
