// Loads the model and samples, beside the page, so that the page stays responsive.

import { problemOf, sample } from "./diffusion.js";

const FOLDER = new URL("model/", self.location.href);
let loaded;
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

async function fetched(name) {
  const answer = await fetch(new URL(name, FOLDER)).catch(() => null);
  if (!answer?.ok) throw new Error(`The file ${name} of the model is missing.`);
  return answer;
}

async function json(name) {
  const answer = await fetched(name);
  return answer.json().catch(() => {
    throw new Error(`The file ${name} of the model is damaged.`);
  });
}

async function load() {
  const [model, samplers] = [await json("model.json"), await json("samplers.json")];
  const problem = problemOf(model, samplers);
  if (problem) throw new Error(problem);
  const bytes = new Uint8Array(await (await fetched("denoiser.onnx")).arrayBuffer());
  const { ort, session, device } = await makeSession(bytes);
  const [shape] = session.inputMetadata.filter(({ name }) => name === "x_t").map((input) => input.shape ?? []);
  if (String(shape?.slice(1)) !== String(model.shape)) {
    throw new Error(`The network takes images of ${shape?.slice(1).join("x")}, but model.json says ${model.shape.join("x")}.`);
  }
  loaded = { model, samplers, ort, session, device };
  const names = Object.keys(samplers.sample);
  const scale = samplers.sample[names[0]].find((row) => row.guidance_scale !== 1)?.guidance_scale ?? 1;
  self.postMessage({ type: "ready", model, names, scale, device });
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

async function draw({ sampler, fill, labels, ...job }) {
  const { model, samplers, ort, session, device } = loaded;
  const rows = samplers[fill ? "inpaint" : "sample"][sampler];
  let calls = 0;
  const network = async (x, t, conditions, told) => {
    const num = x.length / model.shape.reduce((a, b) => a * b);
    const feeds = {
      x_t: new ort.Tensor("float32", x, [num, ...model.shape]),
      t: new ort.Tensor("int32", new Int32Array(num).fill(t), [num]),
    };
    if (conditions) feeds.label = new ort.Tensor("int32", Int32Array.from(conditions), [num]);
    if (model.inputs?.includes("scale")) {
      feeds.scale = new ort.Tensor("float32", new Float32Array(num).fill(1 / told), [num]);
    }
    calls += num / job.indices.length;
    return (await session.run(feeds)).y.data;
  };
  stopped = false;
  const begin = performance.now();
  const known = fill ?? undefined;
  for await (const { number, x, x_0 } of sample({ model, rows, network, labels, known, ...job })) {
    self.postMessage({ type: "frame", number, total: rows.length, x, x_0 });
    await new Promise((resume) => setTimeout(resume)); // so that "stop" is heard
    if (stopped) break;
  }
  self.postMessage({ type: "done", seconds: (performance.now() - begin) / 1000, calls, device, stopped });
}
