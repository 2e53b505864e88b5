// Sampling with an exported model: noise, the loop over the rows of a sampler, and masks.
//
// `keras_ddpm/rows.py` explains what a row is. All images of a batch lie in one Float32Array, one after the other.

/** Standard normal numbers that depend on the seed, the index of the image and a counter of draws alone.
 *
 * They are those of `keras_ddpm.sampling.counted_noise` for the keys [seed, index], up to rounding. */
export function noise(seed, indices, number, size) {
  const values = new Float32Array(indices.length * size);
  indices.forEach((index, place) => {
    const [a, b] = [seed, index].map((key) => hashed(key + Math.imul(0x85ebca6b, number)));
    for (let i = 0; i < size; i++) {
      const [u, v] = [a + Math.imul(0x9e3779b9, i), b + Math.imul(0xc2b2ae35, i)].map(uniform);
      values[place * size + i] = Math.sqrt(-2 * Math.log(u)) * Math.cos(2 * Math.PI * v);
    }
  });
  return values;
}

function hashed(bits) {
  bits = Math.imul(bits ^ (bits >>> 16), 0x7feb352d);
  bits = Math.imul(bits ^ (bits >>> 15), 0x846ca68b);
  return bits ^ (bits >>> 16);
}

function uniform(bits) {
  return ((hashed(bits) >>> 8) + 0.5) * 2 ** -24;
}

const FIRST = -1; // the draw of x_T; those of row i are 2 i, and 2 i + 1 for known pixels

/** x_T of images: noise, or a mix of two noises on the arc between them. */
export function start(model, seed, indices, mix) {
  const size = model.shape.reduce((a, b) => a * b);
  const x = noise(seed, indices, FIRST, size);
  if (mix && mix.share > 0) {
    const other = noise(mix.seed, indices, FIRST, size);
    for (let image = 0; image < indices.length; image++) {
      const place = [image * size, (image + 1) * size];
      x.set(onTheArc(x.slice(...place), other.subarray(...place), mix.share), place[0]);
    }
  }
  return x.map((value) => value * model.prior_std);
}

function onTheArc(a, b, share) {
  const dot = (p, q) => p.reduce((sum, value, i) => sum + value * q[i], 0);
  const angle = Math.acos(Math.min(1, Math.max(-1, dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)))));
  if (Math.sin(angle) < 1e-6) return a.map((value, i) => (1 - share) * value + share * b[i]);
  const [fromA, fromB] = [1 - share, share].map((part) => Math.sin(part * angle) / Math.sin(angle));
  return a.map((value, i) => fromA * value + fromB * b[i]);
}

/** Runs the rows of a sampler. Yields x and the predicted x_0 after each network call.
 *
 * network(x, t, labels, told) returns the output y of the network, with guidance of the scale that it is told. `known` is `{x_0, mask}` or nothing: where the mask is 1,
 * x is replaced by noisy data after each row, and by the data themselves after the last one. */
export async function* sample({ model, rows, network, seed, indices, labels, scale, mix, known }) {
  const size = model.shape.reduce((a, b) => a * b);
  let x = start(model, seed, indices, mix);
  if (known) {
    const { alpha, sigma } = model.schedule;
    const [alphaT, sigmaT] = [alpha.at(-1), sigma.at(-1)];
    x = x.map((value, i) => (known.mask[i] ? alphaT * known.x_0[i] + (sigmaT * value) / model.prior_std : value));
  }
  let previous = rows[0].from_previous.map(() => new Float32Array(x.length));
  const [low, high] = model.clip_range ?? [-Infinity, Infinity];
  const everywhere = rows.every((row) => row.guidance_scale === 1); // exported without guidance, so without an interval
  for (const [number, row] of rows.entries()) {
    const w = everywhere || row.guidance_scale !== 1 ? scale : 1;
    const y = await guided(network, x, row.t, labels, w, model);
    const x_0 = x.map((value, i) => Math.min(high, Math.max(low, row.x_0_from_x * value + row.x_0_from_y * y[i])));
    const remembered = x.map((value, i) => row.remember_x_0 * x_0[i] + row.remember_x * value);
    const added = row.std ? noise(seed, indices, 2 * number, size) : null;
    x = x.map((value, i) => {
      let sum = row.from_x * value + row.from_x_0 * x_0[i];
      row.from_previous.forEach((factor, k) => (sum += factor * previous[k][i]));
      return added ? sum + row.std * added[i] : sum;
    });
    if (!row.keep) previous = [remembered, ...previous.slice(0, -1)];
    if (known) {
      const again = row.sigma ? noise(seed, indices, 2 * number + 1, size) : null;
      x = x.map((value, i) => {
        if (!known.mask[i]) return value;
        return row.alpha * known.x_0[i] + (again ? row.sigma * again[i] : 0);
      });
    }
    yield { number, x, x_0 };
  }
}

/** The output of the network with guidance: (1 − w) times that without labels plus w times that with them.
 *
 * A network that has learned guidance is told w, up to the largest one that it has seen, and needs one call. */
async function guided(network, x, t, labels, scale, model) {
  const told = scale >= 1 && scale <= (model.max_guidance_scale ?? 1) ? scale : 1;
  if (!labels || scale === told) return network(x, t, labels, told);
  const without = labels.map(() => model.null_label);
  if (scale === 0) return network(x, t, without, 1);
  const both = new Float32Array(2 * x.length);
  both.set(x);
  both.set(x, x.length);
  const y = await network(both, t, [...without, ...labels], 1);
  return x.map((_, i) => (1 - scale) * y[i] + scale * y[x.length + i]);
}

/** Images of another size: enlarged by bicubic interpolation, as by `keras_ddpm.conditions.seen`, or means of blocks. */
export function resized(x, from, to) {
  const [down, across] = [0, 1].map((axis) => taps(from[axis], to[axis]));
  const [height, width, channels] = from;
  const num = x.length / (height * width * channels);
  const result = new Float32Array(num * down.length * across.length * channels);
  let place = 0;
  for (let image = 0; image < num; image++) {
    for (const rows of down) {
      for (const columns of across) {
        for (let channel = 0; channel < channels; channel++, place++) {
          for (const [row, a] of rows) {
            for (const [column, b] of columns) {
              result[place] += a * b * x[((image * height + row) * width + column) * channels + channel];
            }
          }
        }
      }
    }
  }
  return result;
}

/** The old pixels that each new pixel of a line is made of, with their weights. */
function taps(old, size) {
  return Array.from({ length: size }, (_, pixel) => {
    if (size <= old) return Array.from({ length: old / size }, (_, k) => [(pixel * old) / size + k, size / old]);
    const place = ((pixel + 0.5) * old) / size - 0.5;
    const near = [-1, 0, 1, 2].map((k) => Math.floor(place) + k).filter((k) => k >= 0 && k < old);
    const weights = near.map((k) => cubic(Math.abs(k - place)));
    const sum = weights.reduce((a, b) => a + b);
    return near.map((k, i) => [k, weights[i] / sum]);
  });
}

function cubic(x) {
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((-0.5 * x + 2.5) * x - 4) * x + 2;
}

/** What is known of pictures in another size. A new pixel is known if all of its old ones are. */
export function inSize(fill, shape) {
  if (!fill || fill.shape[0] < shape[0]) return undefined; // drawing was stopped before the pictures were enlarged
  const [x_0, mask] = [fill.x_0, fill.mask].map((values) => resized(values, fill.shape, shape));
  return { x_0, mask: mask.map((share) => (share === 1 ? 1 : 0)) };
}

/** Says in one sentence what is wrong with the files of a model, or nothing. An upscaler also takes images. */
export function problemOf(model, samplers, isUpscaler) {
  const isShape = Array.isArray(model.shape) && model.shape.length === 3 && [1, 3].includes(model.shape[2]);
  if (!isShape) return "model.json does not describe a model of images.";
  const known = ["x_t", "t", "label", "scale", ...(isUpscaler ? ["image", "image_noise"] : [])];
  const unknown = (model.inputs ?? []).filter((name) => !known.includes(name));
  if (unknown.length) return `The network takes ${unknown.join(", ")}, for which this page has no control.`;
  const timesteps = model.schedule?.alpha?.length - 1;
  if (!(timesteps > 0)) return "model.json has no schedule.";
  for (const kind of ["sample", "inpaint"]) {
    const tables = Object.entries(samplers[kind] ?? {});
    if (!tables.length) return `samplers.json has no samplers under "${kind}".`;
    for (const [name, rows] of tables) {
      const valid = rows.length && rows.every(({ t }) => Number.isInteger(t) && t >= 1 && t <= timesteps);
      if (!valid) return `The sampler "${name}" has a time outside 1..${timesteps}, the steps of the model.`;
    }
  }
}
