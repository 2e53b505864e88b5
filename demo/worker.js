// Loads the models and samples, beside the page, so that the page stays responsive.

import { inSize, problemOf, resized, sample } from "./diffusion.js";

const models = []; // the model, and perhaps an upscaler, which enlarges what the model draws
let stopped = false;

self.onmessage = async ({ data }) => {
  if (data.type === "stop") {
    stopped = true;
    return;
  }
  try {
    await (data.type === "load" ? load() : draw(data.job));
  } catch (error) {
    self.postMessage({ type: "error", message: error.message ?? String(error) });
  }
};

async function fetched(folder, name) {
  const answer = await fetch(new URL(`${folder}/${name}`, self.location.href)).catch(() => null);
  if (!answer?.ok) throw new Error(`The file ${name} of the model is missing.`);
  return answer;
}

async function json(folder, name) {
  const answer = await fetched(folder, name);
  return answer.json().catch(() => {
    throw new Error(`The file ${name} of the model is damaged.`);
  });
}

async function load() {
  for (const folder of await json(".", "models.json")) models.push(await loaded(folder, models.length > 0));
  const [{ model, samplers, scale, device }] = models;
  self.postMessage({ type: "ready", model, names: Object.keys(samplers.sample), scale, device });
}

async function loaded(folder, isUpscaler) {
  const [model, samplers] = [await json(folder, "model.json"), await json(folder, "samplers.json")];
  const problem = problemOf(model, samplers, isUpscaler);
  if (problem) throw new Error(problem);
  const bytes = new Uint8Array(await (await fetched(folder, "denoiser.onnx")).arrayBuffer());
  const { ort, session, device } = await makeSession(bytes);
  const [shape] = session.inputMetadata.filter(({ name }) => name === "x_t").map((input) => input.shape ?? []);
  if (String(shape?.slice(1)) !== String(model.shape)) {
    throw new Error(`The network takes images of ${shape?.slice(1).join("x")}, but model.json says ${model.shape.join("x")}.`);
  }
  const [first] = Object.values(samplers.sample);
  const scale = first.find((row) => row.guidance_scale !== 1)?.guidance_scale ?? 1;
  return { model, samplers, first, scale, ort, session, device };
}

/** A session of ONNX Runtime, by WebGPU if there is one, and otherwise by WebAssembly. */
async function makeSession(bytes) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  for (const kind of adapter ? ["webgpu", "wasm"] : ["wasm"]) {
    const ort = await import(`./ort/ort.${kind}.min.mjs`);
    ort.env.wasm.wasmPaths = new URL("./ort/", self.location.href).href;
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency) : 1;
    ort.env.logLevel = "error";
    try {
      const session = await ort.InferenceSession.create(bytes, { executionProviders: [kind] });
      const threads = ort.env.wasm.numThreads;
      const device = kind === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
      return { ort, session, device };
    } catch (error) {
      if (kind === "wasm") throw new Error("The file denoiser.onnx of the model is damaged.");
    }
  }
}

async function draw({ seed, sampler, scale, mix, indices, labels, fill }) {
  const [{ samplers, device }] = models;
  const tables = models.map(({ first }, place) => (place ? first : samplers[fill ? "inpaint" : "sample"][sampler]));
  const total = tables.reduce((sum, rows) => sum + rows.length, 0);
  let [calls, number, image] = [0, 0];
  stopped = false;
  const begin = performance.now();
  for (const [place, { model, scale: own, ort, session }] of models.entries()) {
    const { shape, inputs } = model;
    const condition = image && resized(image.x, image.shape, shape);
    const network = async (x, t, kinds, told) => {
      const num = x.length / shape.reduce((a, b) => a * b);
      const repeated = (value) => new Float32Array(num).fill(value);
      const feeds = {
        x_t: new ort.Tensor("float32", x, [num, ...shape]),
        t: new ort.Tensor("int32", new Int32Array(num).fill(t), [num]),
      };
      if (inputs.includes("label")) feeds.label = new ort.Tensor("int32", Int32Array.from(kinds), [num]);
      if (inputs.includes("scale")) feeds.scale = new ort.Tensor("float32", repeated(1 / told), [num]);
      if (condition) {
        const images = new Float32Array(x.length).map((_, i) => condition[i % condition.length]);
        feeds.image = new ort.Tensor("float32", images, [num, ...shape]);
        feeds.image_noise = new ort.Tensor("float32", repeated(0), [num]);
      }
      calls += num / indices.length;
      return (await session.run(feeds)).y.data;
    };
    const settings = place ? { seed: seed + place, scale: own } : { seed, scale, mix };
    const known = inSize(fill, shape);
    for await (const { x, x_0 } of sample({ model, rows: tables[place], network, indices, labels, known, ...settings })) {
      self.postMessage({ type: "frame", number: number++, total, x, x_0, shape });
      image = { x, shape };
      await new Promise((resume) => setTimeout(resume)); // so that "stop" is heard
      if (stopped) break;
    }
    if (stopped) break;
  }
  self.postMessage({ type: "done", seconds: (performance.now() - begin) / 1000, calls, device, stopped });
}
