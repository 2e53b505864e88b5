"""Comparisons of sets of images, in the features of a network: KID, FID, precision and recall, memorisation.

    >>> kid = keras_ddpm.metrics.KernelInceptionDistance()
    >>> for batch in held_out:
    ...     kid.update_state(real_images=batch)
    >>> kid.update_state(generated_images=model.sample(2000, seed=0))
    >>> kid.result(), kid.standard_error()
    >>> kid.floor(training_images, 2000)  # what as many real images get

Images are float arrays `(num, height, width, channels)` in [-1, 1], used as given: rounding samples to 8 bits is the
caller's. What is collected stays in float64 on the host, so the metrics are called like this, not compiled into a
model. A number means something beside its n, its extractor and the number for as many real images: see
`describe` and `floor`.

To add one, write a subclass of `_Distance`.
"""

import dataclasses
import hashlib
import pathlib

import keras
import numpy as np

from keras_ddpm import _checks
from keras_ddpm import hardware


class Extractor:
    """From images to features.

    Args:
        model: a Keras model from images to vectors, or the path of one: its features are the output of its layer of
            the name "features", or its own where there is none. `None` for the average-pooled features of InceptionV3
            trained on ImageNet, whose weights are downloaded at first use.

    Attributes:
        name: that of the model.
        hash: twelve digits of the SHA-256 of its weights.

    Raises:
        ConnectionError: if InceptionV3's weights cannot be had.
        ValueError: if the model does not make vectors.
    """

    def __init__(self, model=None):
        self.inception = model is None
        if self.inception:
            try:
                inception = keras.applications.InceptionV3(include_top=False, pooling="avg", input_shape=(299, 299, 3))
            except Exception as error:  # of many kinds
                raise ConnectionError(
                    "InceptionV3's weights cannot be downloaded. Give an `extractor`: a Keras model from images to "
                    f"features, such as a classifier of the same data without its last layer. {error}"
                ) from error
            # Resized batch by batch: thousands of images of 299x299 at once would fill the memory.
            x = keras.Input((None, None, 3))
            resized = keras.layers.Resizing(299, 299, antialias=True)(x)
            model = keras.Model(x, inception(resized), name=inception.name)
        elif not isinstance(model, keras.Model):
            model = keras.saving.load_model(model)
        if any(layer.name == "features" for layer in model.layers):
            model = keras.Model(model.inputs, model.get_layer("features").output, name=model.name)
        if len(model.inputs) != 1 or len(model.outputs) != 1 or len(model.output_shape) != 2:
            raise ValueError(f"An extractor has one input and makes one vector of each. Received: {model.name}")
        self.model = model
        self.name = model.name
        digest = hashlib.sha256()
        for weight in model.get_weights():
            digest.update(np.ascontiguousarray(weight).tobytes())
        self.hash = digest.hexdigest()[:12]

    def __call__(self, images, batch_size=64):
        """Features, float64 `(num, dim)`; ValueError for images that are none or do not fit the model."""
        images = _checks.array(images, "images")
        if images.ndim != 4 or not len(images):
            raise ValueError(f"Expected images (num, height, width, channels). Received: shape {images.shape}")
        if not np.all(np.isfinite(images)):
            raise ValueError("The images hold NaN or infinite values.")
        if self.inception and images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        expected = self.model.input_shape[1:]
        if any(size not in (None, got) for size, got in zip(expected, images.shape[1:], strict=True)):
            raise ValueError(f"The extractor {self.name} takes images {expected}. Received: {images.shape[1:]}")
        features = self.model.predict(images, batch_size=batch_size, verbose=0).astype("float64")
        if not np.all(np.isfinite(features)):
            raise ValueError(f"The features of the extractor {self.name} are NaN or infinite.")
        return features


class _Distance(keras.metrics.Metric):
    """What distances have in common: the features of two sets, collected in some form.

    A subclass says what it keeps of one set (`_empty`, `_add`), and makes a number of two.
    """

    def __init__(self, extractor, name):
        super().__init__(name=name)
        self.extractor = extractor if isinstance(extractor, Extractor) else Extractor(extractor)
        self.reset_state()

    def update_state(self, real_images=None, generated_images=None, sample_weight=None):
        """Adds images to either set or to both.

        Args:
            real_images: `(num, height, width, channels)` in [-1, 1], or `None`.
            generated_images: as many or another number.
            sample_weight: not supported.

        Raises:
            ValueError: for images that are none, hold NaN or do not fit the extractor.
        """
        if sample_weight is not None:
            raise ValueError("The distance of sets knows no weights of images.")
        if real_images is not None:
            self._real = self._add(self._real, self.extractor(real_images))
        if generated_images is not None:
            self._generated = self._add(self._generated, self.extractor(generated_images))

    def reset_state(self):
        self._real = self._empty()
        self.reset_generated()

    def reset_generated(self):
        """Forgets the generated images, for the next model or epoch."""
        self._generated = self._empty()

    def save_real(self, path):
        """Writes what is known of the real images, to a `.npz` file."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"metric": type(self).__name__, "extractor": self.extractor.name, "hash": self.extractor.hash}
        np.savez(path, **about, **self._real)

    def load_real(self, path):
        """Reads what `save_real` has written, in place of the real images so far.

        Raises:
            ValueError: for a file of another metric or extractor.
        """
        with np.load(path) as file:
            arrays = dict(file)
        found = [str(arrays.pop(key, "?")) for key in ("metric", "extractor", "hash")]
        expected = [type(self).__name__, self.extractor.name, self.extractor.hash]
        if found[::2] != expected[::2]:
            raise ValueError(f"{path} is of {' '.join(found)}. Expected: {' '.join(expected)}")
        self._real = arrays

    @property
    def num_real(self):
        """Number of the real images so far."""
        return self._num(self._real)

    @property
    def num_generated(self):
        """Number of the generated images so far."""
        return self._num(self._generated)

    def values(self):
        """A dict of the result and its standard error, by name."""
        return {self.name: self.result(), f"{self.name}_standard_error": self.standard_error()}

    def describe(self):
        """A dict of the values, both n, and the name and hash of the extractor."""
        return {
            **self.values(),
            "num_real": self.num_real,
            "num_generated": self.num_generated,
            "extractor": self.extractor.name,
            "extractor_hash": self.extractor.hash,
        }

    def compare(self, generated_images):
        """The result for these generated images, in place of those so far."""
        self.reset_generated()
        return self(generated_images=generated_images)

    def floor(self, images, num, num_draws=10, seed=0):
        """What real images get in place of generated ones, for comparison.

        Args:
            images: real images, others than those that the metric has been given and, to be a floor, than those that
                the extractor was trained on.
            num: how many are drawn at a time, without replacement.
            num_draws: how often.
            seed: of the drawing.

        Returns:
            Mean and standard deviation of the results, each like a result. The real images are the same in all draws,
            so that the deviation lacks their chance.

        Raises:
            ValueError: for fewer images than `num`.
        """
        if not _checks.is_count(num) or num > len(images):
            raise ValueError(f"`num` must be in 1..{len(images)}, the number of images. Received: num={num!r}")
        random = np.random.default_rng(seed)
        chosen = [random.choice(len(images), num, replace=False) for _ in range(num_draws)]
        needed, rows = np.unique(chosen, return_inverse=True)
        features = self.extractor(images[needed])
        generated, values = self._generated, []
        try:
            for indices in rows.reshape(num_draws, num):
                self._generated = self._add(self._empty(), features[indices])
                values.append(self.result())
        finally:
            self._generated = generated
        return np.mean(values, axis=0).tolist(), np.std(values, axis=0, ddof=1).tolist()


class _FeatureDistance(_Distance):
    """A distance that needs the features themselves."""

    def _empty(self):
        return {"features": np.empty((0, 0))}

    def _add(self, state, features):
        kept = state["features"]
        return {"features": np.concatenate([kept, features]) if len(kept) else features}

    def _num(self, state):
        return len(state["features"])

    def _features(self, at_least):
        sets = self._real["features"], self._generated["features"]
        if min(map(len, sets)) < at_least:
            raise ValueError(
                f"Expected at least {at_least} images in each set. Received: {len(sets[0])} real and {len(sets[1])} "
                "generated ones"
            )
        return sets


class KernelInceptionDistance(_FeatureDistance):
    """KID: the squared maximum mean discrepancy of features under the kernel (x·y / dim + 1)³, without bias.

    The smaller set is cut at random into k disjoint subsets of at least `subset_size` images, the larger one into as
    many; the value is the mean of the k distances, as defined (often it is reported times 1000), and its mean over
    sets is 0 where both come from the same distribution. The standard error is that of the mean of the k distances.

    Args:
        extractor: see `Extractor`.
        subset_size: as many images are at least in a subset; at least 2.
        seed: of the cut.
        name: name of the metric.

    Raises:
        ValueError: at `result`, for fewer images than a subset.

    Reference: Bińkowski et al., 2018, Eq. 4 and section 4.
    """

    def __init__(self, extractor=None, subset_size=1000, seed=0, name="kid"):
        if not _checks.is_count(subset_size, low=2):
            raise ValueError(f"`subset_size` must be an integer of at least 2. Received: subset_size={subset_size!r}")
        self.subset_size = subset_size
        self.seed = seed
        super().__init__(extractor, name)

    def _distances(self):
        sets = self._features(at_least=self.subset_size)
        num = min(map(len, sets)) // self.subset_size
        random = np.random.default_rng(self.seed)
        parts = [np.array_split(features[random.permutation(len(features))], num) for features in sets]
        return [_squared_discrepancies(*_united(x, y))[0] for x, y in zip(*parts)]

    def result(self):
        return float(np.mean(self._distances()))

    def standard_error(self):
        """Of `result`, a Python float; NaN where there is one subset."""
        distances = self._distances()
        return float(np.std(distances, ddof=1) / len(distances) ** 0.5) if len(distances) > 1 else float("nan")

    def p_value(self, num_permutations=1000, max_images=1000):
        """How probable a distance this large is if both sets come from one distribution.

        The images are dealt out at random to two sets again and again; the p-value is the share of the distances,
        that of the sets as they are among them, which are at least as large as this one.

        Args:
            num_permutations: how often; the smallest p-value is 1 / (1 + num_permutations).
            max_images: at most as many of each set are used, drawn at random.

        Returns:
            A Python float.

        Raises:
            ValueError: for fewer than 2 images in a set, or numbers too small.

        Reference: Gretton et al., 2012, section 3 and theorem 12.
        """
        if not _checks.is_count(num_permutations) or not _checks.is_count(max_images, low=2):
            raise ValueError(
                "Expected at least one permutation and two images. "
                f"Received: num_permutations={num_permutations!r}, max_images={max_images!r}"
            )
        random = np.random.default_rng(self.seed)
        x, y = (features[random.permutation(len(features))[:max_images]] for features in self._features(at_least=2))
        features, first = _united(x, y)
        dealt = random.permuted(np.repeat(first, num_permutations, axis=0), axis=1)
        value, *values = _squared_discrepancies(features, np.concatenate([first, dealt]))
        return float((1 + np.sum(values >= value)) / (1 + num_permutations))


def _united(x, y):
    """The features of both sets, and a row that is 1 for those of the first and 0 for the others."""
    return np.concatenate([x, y]), np.repeat([1.0, 0.0], [len(x), len(y)])[None]


def _squared_discrepancies(features, first):
    """The unbiased estimate for each row of `first`, which tells the two sets in `features` apart as `_united` does."""
    within_first = with_first = total = 0.0
    for rows in np.array_split(np.arange(len(features)), -(-len(features) // 1000)):
        kernel = (features[rows] @ features.T / features.shape[1] + 1) ** 3
        kernel[np.arange(len(rows)), rows] = 0  # an image beside itself does not count
        within_first += np.sum(first @ kernel.T * first[:, rows], axis=1)
        with_first += first[:, rows] @ kernel.sum(axis=1)
        total += kernel.sum()
    between = with_first - within_first
    within_second = total - within_first - 2 * between
    n = first.sum(axis=1)
    m = len(features) - n
    return within_first / (n * (n - 1)) + within_second / (m * (m - 1)) - 2 * between / (n * m)


class PrecisionRecall(_FeatureDistance):
    """How many generated images look real, and how much of what is real is generated.

    Around every image of a set lies a ball that reaches to its k-th nearest neighbour in the set. Precision is the
    share of the generated images that lie in a ball of a real one, recall the share of the real images that lie in a
    ball of a generated one. Both depend on the number of images; take as many of each.

    Args:
        extractor: see `Extractor`.
        k: which neighbour.
        name: name of the metric.

    Attributes:
        names: of the two numbers.

    Raises:
        ValueError: for a k that is no positive integer; at `result`, for no more than k images in a set.

    Reference: Kynkäänniemi et al., 2019, section 2 and Eq. 1-2.
    """

    names = ("precision", "recall")

    def __init__(self, extractor=None, k=3, name="precision_recall"):
        if not _checks.is_count(k):
            raise ValueError(f"`k` must be a positive integer. Received: k={k!r}")
        self.k = k
        super().__init__(extractor, name)

    def result(self):
        """A pair of Python floats, precision and recall."""
        real, generated = self._features(at_least=self.k + 1)
        return _share_inside(generated, real, self.k), _share_inside(real, generated, self.k)

    def standard_error(self):
        """Binomial, of either, where the other set is given: sqrt(p (1 − p) / n)."""
        return self._errors(self.result())

    def values(self):
        shares = self.result()
        errors = {f"{name}_standard_error": error for name, error in zip(self.names, self._errors(shares))}
        return {**dict(zip(self.names, shares)), **errors}

    def _errors(self, shares):
        numbers = self.num_generated, self.num_real
        return tuple(float(np.sqrt(p * (1 - p) / n)) for p, n in zip(shares, numbers))


def _share_inside(x, y, k):
    """The share of x that lies in a ball around one of y that reaches to its k-th neighbour in y."""
    radius = np.concatenate([np.partition(rows, k, axis=1)[:, k] for rows in _squared_distances(y, y)])
    return float(np.concatenate([np.any(rows <= radius, axis=1) for rows in _squared_distances(x, y)]).mean())


def _squared_distances(x, y, at_once=10_000_000):
    """Rows of the matrix of all pairs, some at a time."""
    lengths = np.sum(y**2, axis=1)
    for part in np.array_split(x, -(-len(x) * len(y) // at_once)):
        yield np.maximum(np.sum(part**2, axis=1)[:, None] - 2 * part @ y.T + lengths, 0)


@dataclasses.dataclass(frozen=True)
class Memorisation:
    """What `memorisation` finds.

    Attributes:
        share: of the generated images that are nearer to a training image than nearly all held-out ones are.
        standard_error: of the share, from the numbers of both kinds of images.
        quantile: the share of the held-out images that are as near; what a model has that does not memorise.
        nearest: for each generated image, the number of the training image nearest to it, `(num,)`.
        distances: from one to the other, in features, `(num,)`.
        held_out_distances: from held-out images to the training images nearest to them.
    """

    share: float
    standard_error: float
    quantile: float
    nearest: np.ndarray
    distances: np.ndarray
    held_out_distances: np.ndarray


def memorisation(extractor, training_images, held_out_images, generated_images, quantile=0.05):
    """Whether generated images are copies of training images.

    The distance to the nearest training image is set beside that of held-out images: the share `quantile` of these is
    nearer than the `quantile` of theirs, and so, on average, is that share of the generated images, unless they are
    copies, or duller than photographs: look at the pairs.

    Args:
        extractor: an `Extractor`, or what makes one.
        training_images: `(num, height, width, channels)` in [-1, 1], all that the model was trained on, also mirrored
            ones.
        held_out_images: others from the same source.
        generated_images: samples of the model.
        quantile: in (0, 1).

    Returns:
        A `Memorisation`.

    Raises:
        ValueError: for images that do not fit the extractor, a quantile outside (0, 1), or fewer than 1 / quantile
            held-out images.
    """
    if not _checks.is_positive(quantile) or quantile >= 1:
        raise ValueError(f"`quantile` must be in (0, 1). Received: quantile={quantile!r}")
    if len(held_out_images) < 1 / quantile:
        raise ValueError(f"The quantile {quantile} of {len(held_out_images)} held-out images is not known.")
    extractor = extractor if isinstance(extractor, Extractor) else Extractor(extractor)
    training = extractor(training_images)
    nearest, distances = _nearest(extractor(generated_images), training)
    _, held_out = _nearest(extractor(held_out_images), training)
    # Of quantiles of a sample, the one below which the share of others is `quantile` on average.
    share = float(np.mean(distances < np.quantile(held_out, quantile, method="weibull")))
    error = float(np.sqrt(share * (1 - share) / len(distances) + quantile * (1 - quantile) / len(held_out)))
    return Memorisation(share, error, quantile, nearest, distances, held_out)


def _nearest(x, y):
    """Of each in x, the number of the nearest in y and its distance."""
    found = [(rows.argmin(axis=1), rows.min(axis=1)) for rows in _squared_distances(x, y)]
    numbers, squares = map(np.concatenate, zip(*found))
    return numbers, np.sqrt(squares)


class FrechetInceptionDistance(_Distance):
    """FID: the squared 2-Wasserstein distance between Gaussians with the features' means and covariances.

    It falls with the number of images, so that only values at the same n can be compared. The standard error is a
    jackknife: from the values without each tenth of the images.

    Args:
        extractor: see `Extractor`.
        name: name of the metric.

    Raises:
        ValueError: at `result`, for fewer than 2 images in a set; at `standard_error`, for fewer than 20.

    Reference: Heusel et al., 2017, Eq. 6.
    """

    num_groups = 10

    def __init__(self, extractor=None, name="fid"):
        super().__init__(extractor, name)

    def _empty(self):
        return {"num": np.zeros(self.num_groups)}

    def _add(self, state, features):
        """Image number i of a set belongs to group i mod 10."""
        groups = (np.arange(len(features)) + int(state["num"].sum())) % self.num_groups
        added = [_moments(features[groups == group]) for group in range(self.num_groups)]
        if state["num"].any():
            known = zip(state["num"], state["mean"], state["scatter"])
            added = [_merged([old, new]) for old, new in zip(known, added)]
        return dict(zip(("num", "mean", "scatter"), map(np.array, zip(*added))))

    def _num(self, state):
        return int(state["num"].sum())

    def _distance(self, without=None):
        gaussians = []
        for name, state in (("real", self._real), ("generated", self._generated)):
            if self._num(state) < 2:
                raise ValueError(f"A covariance needs at least 2 images. Received: {self._num(state)} {name} ones")
            groups = zip(state["num"], state["mean"], state["scatter"])
            num, mean, scatter = _merged([group for index, group in enumerate(groups) if index != without])
            gaussians.append((mean, scatter / (num - 1)))
        return _frechet_distance(*gaussians)

    def result(self):
        return self._distance()

    def standard_error(self):
        """Of `result`, a Python float."""
        if min(self._num(self._real), self._num(self._generated)) < 2 * self.num_groups:
            raise ValueError(f"The standard error needs at least {2 * self.num_groups} images in each set.")
        values = [self._distance(without=group) for group in range(self.num_groups)]
        return float(np.sqrt((self.num_groups - 1) * np.var(values)))


def _moments(x):
    """Number, mean, and the sum of outer products around it, of `(num, dim)`."""
    mean = x.mean(axis=0) if len(x) else np.zeros(x.shape[1])
    return len(x), mean, (x - mean).T @ (x - mean)


def _merged(moments):
    """The moments of the union. [Chan et al., 1983]"""
    num = sum(n for n, _, _ in moments)
    mean = sum(n * m for n, m, _ in moments) / max(num, 1)
    return num, mean, sum(s + n * np.outer(m - mean, m - mean) for n, m, s in moments)


def _frechet_distance(p, q):
    """Between the Gaussians `(mean, covariance)`; tr √(C D) is that of the symmetric √C D √C."""
    (mean_p, c), (mean_q, d) = p, q
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ d @ root), 0)).sum()
    return float(np.sum((mean_p - mean_q) ** 2) + np.trace(c) + np.trace(d) - 2 * cross)


def train_classifier(x, labels, epochs=5, verbose=0):
    """A small classifier of images, to be an extractor where features of ImageNet fit badly.

    >>> kid = KernelInceptionDistance(train_classifier(images, labels))

    Args:
        x: `(num, height, width, channels)` in [-1, 1], of at least 6x6.
        labels: integers, `(num,)`, 0..K − 1.
        epochs: passes over the data.
        verbose: as in `keras.Model.fit`.

    Returns:
        A compiled `keras.Model` from images to logits `(num, K)`, with a layer "features" of 128 numbers.

    Raises:
        ValueError: for images that are none, or not as many labels.
    """
    x, labels = _checks.array(x, "x"), np.asarray(labels)
    if x.ndim != 4 or min(x.shape[1:3]) < 6 or labels.shape != (len(x),):
        raise ValueError(f"Expected images of at least 6x6 and a label for each. Received: {x.shape}, {labels.shape}")
    inputs = h = keras.Input(x.shape[1:])
    width = 32
    while min(h.shape[1:3]) > 6 or h is inputs:
        h = keras.layers.Conv2D(width, 3, strides=2, activation="relu")(h)
        width *= 2
    h = keras.layers.Dropout(0.3)(keras.layers.Flatten()(h))
    h = keras.layers.Dense(128, activation="relu", name="features")(h)
    classifier = keras.Model(inputs, keras.layers.Dense(int(labels.max()) + 1)(h), name="classifier")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile("adam", loss, metrics=["accuracy"], jit_compile=hardware.jit_compile())
    classifier.fit(x, labels, batch_size=min(128, len(x)), epochs=epochs, verbose=verbose)
    return classifier
