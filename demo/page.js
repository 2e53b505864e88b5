// The page: the form, the pictures, the mask and the link.

const MOST = 16; // pictures at a time
const element = (id) => document.getElementById(id);
const form = element("form");
const fields = form.elements;
const worker = new Worker("worker.js", { type: "module" });
let model;
let job; // what is being drawn
let shown; // what is on the easel: the job, with x, x_0 and the shape of one picture

worker.onmessage = ({ data }) => ({ ready, frame, done, error: ({ message }) => say(message, true) })[data.type](data);
worker.onerror = () => say("The program of this page could not be loaded.", true);
worker.postMessage({ type: "load" });

function say(text, isWrong = false) {
  element("status").textContent = text;
  element("status").classList.toggle("wrong", isWrong);
  if (isWrong) busy(false);
}

/** Enables what can be done now. */
function busy(isBusy) {
  const needs = { draw: model, another: model, middle: shown, save: shown, link: shown };
  for (const [id, needed] of Object.entries(needs)) element(id).disabled = isBusy || !needed;
  for (const id of ["clear", "fill"]) element(id).disabled = isBusy || !shown || !isMarked();
  element("stop").disabled = !isBusy;
}

function ready({ model: described, names, scale, device }) {
  model = described;
  fields.sampler.append(...names.map((name) => new Option(name)));
  element("kind").hidden = element("guidance").hidden = !model.num_classes;
  if (model.num_classes) {
    const kinds = model.class_names ?? Array.from({ length: model.num_classes }, (_, label) => `class ${label}`);
    const sorted = kinds.map((name, label) => new Option(name, label)).sort((a, b) => a.text.localeCompare(b.text));
    fields.label.append(new Option("various", "various"), ...sorted);
    fields.guidance.value = scale;
  }
  showValues();
  say(`Ready, by ${device}.`);
  busy(false);
  if (location.hash.length > 1 && readLink()) draw();
}

// The link.

function writeLink() {
  const link = new URLSearchParams({ seed: fields.seed.value });
  if (model.num_classes) {
    link.set("label", fields.label.selectedOptions[0].text);
    link.set("guidance", fields.guidance.value);
  }
  link.set("sampler", fields.sampler.value);
  link.set("num", fields.num.value);
  if (Number(fields.share.value)) link.set("mix", `${fields.other.value}:${fields.share.value}`);
  history.replaceState(null, "", `#${link}`);
}

/** Sets the form from the link. Says what is wrong with it, and returns whether it is right. */
function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  const [other, share] = (link.get("mix") ?? "1:0").split(":");
  const wanted = { ...Object.fromEntries(link), other, share };
  delete wanted.mix;
  for (const [name, value] of Object.entries(wanted)) {
    const field = fields[name];
    if (!field) return wrong(`The link has an unknown part "${name}".`);
    if (field.options) {
      const options = [...field.options];
      const same = options.find(({ text }) => text === value);
      const option = same ?? options.find(({ text }) => text.toLowerCase() === value.toLowerCase());
      if (!option && name === "num") return wrong(`The link asks for ${value} pictures. There are 1, 4, 9 or ${MOST} at a time.`);
      if (!option) return wrong(`There is no ${name} "${value}".`);
      field.value = option.value;
      continue;
    }
    const [low, high, number] = [field.min, field.max, value].map(Number);
    const isWhole = field.type === "range" || Number.isInteger(number);
    if (value === "" || !(isWhole && number >= low && number <= high)) {
      return wrong(`The ${name} in the link must be a number from ${low} to ${high}.`);
    }
    field.value = value;
  }
  showValues();
  return true;
}

function wrong(text) {
  say(text, true);
  return false;
}

// Drawing.

function draw(fill) {
  if (!form.reportValidity()) return;
  writeLink();
  const seed = Number(fields.seed.value);
  // Multiples of the golden ratio are spread evenly, however many there are.
  const various = (index) => Math.floor((((seed * 7 + index) * 0.618034) % 1) * model.num_classes);
  const labelOf = (index) => (fields.label.value === "various" ? various(index) : Number(fields.label.value));
  const indices = Array.from({ length: Number(fields.num.value) }, (_, index) => index);
  job = {
    seed,
    sampler: fields.sampler.value,
    scale: Number(fields.guidance.value),
    mix: { seed: Number(fields.other.value), share: Number(fields.share.value) },
    indices: fill ? shown.indices : indices,
    labels: fill ? shown.labels : model.num_classes && indices.map(labelOf),
    fill,
  };
  busy(true);
  say("Drawing.");
  worker.postMessage({ type: "draw", job });
}

function frame({ number, total, x, x_0, shape }) {
  shown = { ...job, x, x_0, shape };
  show(element("noisy"), x);
  show(element("picture"), x_0);
  element("progress").value = (number + 1) / total;
}

function done({ seconds, calls, device, stopped }) {
  if (!stopped) {
    show(element("picture"), (shown.x_0 = shown.x));
    clearMask();
  }
  const num = shown.indices.length;
  const took = `${num} picture${num > 1 ? "s" : ""} in ${seconds.toFixed(1)} s: ${calls} network calls each, by ${device}.`;
  say(stopped ? "Stopped." : took);
  busy(false);
}

const size = () => shown.shape.reduce((a, b) => a * b);

/** Draws the images of a batch as a square grid. */
function show(canvas, x) {
  const [height, width, channels] = shown.shape;
  const [low, high] = model.clip_range ?? [-1, 1];
  const num = x.length / size();
  const columns = Math.ceil(Math.sqrt(num));
  if (canvas.width !== columns * width) {
    [canvas.width, canvas.height] = [columns * width, columns * height];
    clearMask();
  }
  const context = canvas.getContext("2d", { willReadFrequently: true });
  for (let image = 0; image < num; image++) {
    const pixels = context.createImageData(width, height);
    for (let i = 0; i < height * width; i++) {
      for (let channel = 0; channel < 4; channel++) {
        const value = x[image * size() + i * channels + Math.min(channel, channels - 1)];
        pixels.data[4 * i + channel] = channel === 3 ? 255 : ((value - low) / (high - low)) * 255; // clamps, and rounds
      }
    }
    context.putImageData(pixels, (image % columns) * width, Math.floor(image / columns) * height);
  }
}

// The mask, as large as the picture. Marked pixels are opaque.

const mask = element("mask");
const marks = mask.getContext("2d", { willReadFrequently: true });

function clearMask() {
  const { width, height } = element("picture");
  Object.assign(mask, { width, height });
}

function isMarked() {
  return marks.getImageData(0, 0, mask.width, mask.height).data.some((value) => value);
}

function mark(x, y, width, height) {
  marks.fillStyle = "#6d3fb5";
  marks.fillRect(x, y, width, height);
}

function paint(event) {
  if (element("middle").disabled || !event.buttons) return;
  const box = mask.getBoundingClientRect();
  const brush = Math.round(shown.shape[0] / 8);
  const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  mark(...place.map((share) => Math.round(share * mask.width - brush / 2)), brush, brush);
  busy(false);
}

mask.addEventListener("pointerdown", (event) => {
  mask.setPointerCapture(event.pointerId);
  paint(event);
});
mask.addEventListener("pointermove", paint);

element("middle").onclick = () => {
  const [height, width] = shown.shape;
  const columns = mask.width / width;
  for (let i = 0; i < shown.indices.length; i++) {
    const [left, top] = [(i % columns) * width, Math.floor(i / columns) * height];
    mark(left + width / 4, top + height / 4, width / 2, height / 2);
  }
  busy(false);
};
element("clear").onclick = () => {
  clearMask();
  busy(false);
};
element("fill").onclick = () => {
  const [height, width, channels] = shown.shape;
  const columns = mask.width / width;
  const marked = marks.getImageData(0, 0, mask.width, mask.height).data;
  const isKnown = new Uint8Array(shown.x_0.length).map((_, i) => {
    const [image, pixel] = [Math.floor(i / size()), Math.floor((i % size()) / channels)];
    const left = (image % columns) * width + (pixel % width);
    const top = Math.floor(image / columns) * height + Math.floor(pixel / width);
    return marked[4 * (top * mask.width + left) + 3] ? 0 : 1;
  });
  draw({ x_0: shown.x_0, mask: isKnown, shape: shown.shape });
};

// The other controls.

function showValues() {
  for (const output of form.querySelectorAll("output")) output.value = element(output.htmlFor[0]).value;
}

form.addEventListener("input", showValues);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
element("another").onclick = () => {
  fields.seed.value = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
  draw();
};
element("stop").onclick = () => worker.postMessage({ type: "stop" });
element("save").onclick = () => {
  const link = document.createElement("a");
  link.download = `${fields.label.selectedOptions[0]?.text ?? "picture"} ${fields.seed.value}.png`;
  link.href = element("picture").toDataURL("image/png");
  link.click();
};
element("link").onclick = async () => {
  await navigator.clipboard.writeText(location.href);
  say("The link is on the clipboard.");
};
window.addEventListener("hashchange", () => model && readLink() && draw());
