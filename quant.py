# SPDX-License-Identifier: MIT
"""Uniform fake quantization for PyTorch: b-bit weights and activations, simulated in float32 and packed as integers.

    student = quantize_model(model, w_bits=4, a_bits=4)   # a copy; `model` stays as it is
    observe(student); student(images)                     # learn the activation ranges
    equalize_channels(student, model, [images])           # let each channel use more of its layer's range
    correct_batch_norm(student, model, [images])          # undo what rounded weights do to each channel's mean and spread
    freeze(student)                                       # fix the ranges; from here on the student is quantized and trains
    compensate_rounding(student, model, [images])         # let weights make up for rounding errors, of activations too
    torch.save(pack(student), "student.pt")
    student = unpack(torch.load("student.pt", weights_only=True), model)

The maths and the words are those of torch.fake_quantize_per_tensor_affine and ..._per_channel_affine, to the bit:

    q = clamp(round(x / scale) + zero_point, quant_min, quant_max)      rounding half to even
    y = (q - zero_point) * scale

A layer works on the whole numbers q - zero_point and multiplies the scales in afterwards, as integer hardware does.

What is quantized: the weight (per output channel) and the input (per tensor) of every Conv2d and Linear, the first and
the last included. What is not: biases, batch-norm layers, sums, poolings, everything else, in float32.
This module knows torch and nothing else: no paths, flags, losses or training.
"""
import copy
from collections import Counter, OrderedDict

import torch
from torch import fx, nn
from torch.nn import functional as F

__all__ = ["calculate_qparams", "quantize_tensor", "fake_quantize", "QuantConv2d", "QuantLinear", "quantize_model",
           "observe", "freeze", "equalize_channels", "correct_batch_norm", "compensate_rounding", "pack", "unpack"]


# ------------------------------------------------------------------------------------------------ the maths

def quant_bounds(bits, symmetric):
    """The smallest and largest integer code: 0 .. 2^b - 1, or -(2^(b-1) - 1) .. 2^(b-1) - 1 if symmetric."""
    if bits not in range(2, 9):
        raise ValueError(f"bits must be a whole number from 2 to 8, not {bits!r}")
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1)


def calculate_qparams(min_val, max_val, bits, symmetric):
    """Scale and zero point for values between min_val and max_val; zero is always represented exactly.

    min_val, max_val: float32 tensors of one shape, () for a whole tensor or (C,) for C channels. bits: 2 to 8.
    Returns (scale, zero_point, quant_min, quant_max): float32 and int32 tensors of that shape, two Python ints.
    Raises ValueError for other bits. Source: Jacob et al., arXiv 1712.05877, equations 1 and section 3.
    """
    quant_min, quant_max = quant_bounds(bits, symmetric)
    # Half of float32's range keeps (q - zero_point) * scale finite; the smallest normal number keeps 1 / scale finite.
    limit, tiny = torch.finfo(torch.float32).max / 2, torch.finfo(torch.float32).tiny
    min_val, max_val = min_val.float().clamp(-limit, 0), max_val.float().clamp(0, limit)
    if symmetric:
        scale = (torch.maximum(-min_val, max_val) / quant_max).clamp(min=tiny)
        return scale, torch.zeros_like(scale, dtype=torch.int32), quant_min, quant_max
    scale = (max_val / (quant_max - quant_min) - min_val / (quant_max - quant_min)).clamp(min=tiny)
    zero_point = (quant_min - (min_val / scale).round()).clamp(quant_min, quant_max).to(torch.int32)
    return scale, zero_point, quant_min, quant_max


def calculate_range(x, bits, symmetric):
    """(min_val, max_val), each (R,), for the values of each of R rows, x: (R, N) float32.

    At few bits rare extremes cost all other values resolution. So the range is a share, 1, 0.9 ... 0.3, of that from
    minimum to maximum: the one that rounds the row with the least mean |error|^3. With |error|^2 the range is narrower and
    clips more, which was worse at 2 bits before weights made up for rounding errors, and after it within chance.
    """
    low, high = torch.aminmax(x, dim=1) if x.numel() else x.new_zeros(2, len(x))
    shares = [share / 10 for share in range(10, 2, -1)]
    span = (high - low).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    errors = [((fake_quantize(x, *calculate_qparams(share * low, share * high, bits, symmetric), axis=0) - x) / span
               ).abs().pow(3).mean(1) for share in shares]
    share = x.new_tensor(shares)[torch.stack(errors).argmin(0)]
    return share * low, share * high


class _Quantize(torch.autograd.Function):
    """Rounding has gradient zero almost everywhere, so the backward pass leaves it out (straight-through estimator,
    Bengio et al., arXiv 1308.3432). Clipping is kept: where the code was clipped the output does not depend on x, and
    the gradient is zero, as in torch's own operator."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, dequantize):
        inverse = 1 / scale
        q = (x * inverse).round_().add_(zero_point)
        clipped = q.clamp(quant_min, quant_max)
        if ctx.needs_input_grad[0]:
            kept = q.eq_(clipped)  # as numbers: Booleans are several times slower on a CPU
            ctx.save_for_backward(kept if dequantize else kept.mul_(inverse))
        steps = clipped.sub_(zero_point)
        return steps.mul_(scale) if dequantize else steps

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * ctx.saved_tensors[0], None, None, None, None, None


def broadcast_along(values, x, axis):
    """values, (x.shape[axis],), in a shape that broadcasts with x; one value for all of x if axis is None."""
    return values if axis is None else values.view([-1 if i == axis else 1 for i in range(x.dim())])


def quantize_tensor(x, scale, zero_point, quant_min, quant_max, axis=None):
    """x in steps of the grid of (scale, zero_point): q - zero_point, whole numbers from -255 to 255 as float32.

    x: any shape, float32. scale, zero_point: one value for all of x if axis is None, else (x.shape[axis],).
    Returns a tensor like x; its gradient is that of x / scale, except where x was clipped (zero).
    """
    scale, zero_point = broadcast_along(scale, x, axis), broadcast_along(zero_point, x, axis)
    return _Quantize.apply(x, scale, zero_point, quant_min, quant_max, False)


def fake_quantize(x, scale, zero_point, quant_min, quant_max, axis=None):
    """Round x to the grid of (scale, zero_point) and back to float; arguments as of quantize_tensor.

    The gradient passes straight through, except where x was clipped (zero).
    """
    scale, zero_point = broadcast_along(scale, x, axis), broadcast_along(zero_point, x, axis)
    return _Quantize.apply(x, scale, zero_point, quant_min, quant_max, True)


# ------------------------------------------------------------------------------------------------ the layers

class InputQuantizer(nn.Module):
    """Quantizer of one layer's input, with one range for each time that the layer runs in a forward pass: returns the input
    in steps of its grid, and the step.

    Buffers min_val, max_val: (calls,), empty until images were observed; scale, zero_point: (calls,), empty until `freeze`;
    factor: (C,), what each channel is multiplied by beforehand and the layer's weight divided by, empty where by nothing: see
    equalize_channels. Range and scale are then those of the product.
    `calls_so_far` is one Counter for the whole model, emptied when a forward pass starts: it tells which run of the layer this
    one is, and whether the layer is the first of the network, whose input has `input_bits` instead of `bits`, as has any
    layer's that takes the images themselves. These have `input_range` too, but for a first layer that sees something else
    and less than half as wide: the model normalises images once more within itself.
    """

    def __init__(self, bits, symmetric, input_bits, input_range, calls_so_far):
        super().__init__()
        self.default_bits, self.symmetric, self.input_bits, self.input_range = bits, symmetric, input_bits, input_range
        self.calls_so_far = calls_so_far
        self.observing = False
        self.bits = []  # one a call
        self.limit = float("inf")  # while observing, of the magnitude of products with the factor
        for name in ("min_val", "max_val", "scale", "factor"):
            self.register_buffer(name, torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int32))

    def forward(self, x):
        images, first = x.data_ptr() == getattr(self.calls_so_far, "images", None), not self.calls_so_far
        bits = self.input_bits if images or first else self.default_bits
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # under autocast a matmul before it gives bfloat16
        call = self.calls_so_far[id(self)]
        self.calls_so_far[id(self)] += 1
        if self.observing:
            if self.input_range is not None and first and not images:  # padded images, or normalised ones?
                images = x.amax() - x.amin() > (self.input_range[1] - self.input_range[0]) / 2
            if self.factor.numel():
                x = (x * broadcast_along(self.factor, x, 1)).clamp(-self.limit, self.limit)
            self.observe(x.detach(), call, bits, self.input_range if images else None)
            return x, x.new_ones(())
        if not self.bits:
            raise RuntimeError("no activation range: call observe(model), run images through it, then freeze(model)")
        call %= len(self.bits)
        quant_min, quant_max = quant_bounds(self.bits[call], self.symmetric)
        scale, axis = (self.scale[call] / self.factor, 1) if self.factor.numel() else (self.scale[call], None)
        return quantize_tensor(x, scale, self.zero_point[call], quant_min, quant_max, axis), self.scale[call]

    def observe(self, x, call, bits, at_least):
        """Moving average, momentum 0.1, of each batch's calculate_range, widened to `at_least`."""
        low, high = (value[0] for value in calculate_range(x.reshape(1, -1), bits, self.symmetric))
        if at_least is not None:
            low, high = low.clamp(max=at_least[0]), high.clamp(min=at_least[1])
        if call == len(self.bits):
            self.bits.append(bits)
            self.min_val, self.max_val = torch.cat([self.min_val, low[None]]), torch.cat([self.max_val, high[None]])
        else:
            self.min_val[call] += 0.1 * (low - self.min_val[call])
            self.max_val[call] += 0.1 * (high - self.max_val[call])

    def freeze(self):
        qparams = [calculate_qparams(low, high, bits, self.symmetric)[:2]
                   for low, high, bits in zip(self.min_val, self.max_val, self.bits)]
        if qparams:
            self.scale, self.zero_point = (torch.stack(values) for values in zip(*qparams))
        self.observing = False

    # The number of calls is known only once images were observed, so a state dict brings it along.
    def get_extra_state(self):
        return {"bits": self.bits}

    def set_extra_state(self, state):
        self.bits = list(state["bits"])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, buffer in self._buffers.items():
            if prefix + name in state_dict:
                self._buffers[name] = buffer.new_empty(state_dict[prefix + name].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self):
        return f"bits={self.bits or self.default_bits}, symmetric={self.symmetric}, observing={self.observing}"


class QuantConv2d(nn.Conv2d):
    """Conv2d whose weight (per output channel) and input (per tensor) are quantized. Made by quantize_model.

    The convolution is of whole numbers of at most 8 bits and a sign, and the scales are multiplied in afterwards, as
    integer hardware does it. So under autocast nothing of the grid is lost: bfloat16 holds these numbers exactly.
    """

    def forward(self, x):
        x, scale = self.input_quantizer(x)
        y = self._conv_forward(x, integer_weight(self), None) * (scale * self.weight_scale)[:, None, None]
        return y if self.bias is None else y + self.bias[:, None, None]


class QuantLinear(nn.Linear):
    """Linear whose weight (per output row) and input (per tensor) are quantized, like QuantConv2d's. Made by quantize_model."""

    def forward(self, x):
        x, scale = self.input_quantizer(x)
        y = F.linear(x, integer_weight(self)) * (scale * self.weight_scale)
        return y if self.bias is None else y + self.bias


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that uses and keeps its running statistics, whatever `train()` says: synthetic images must not
    replace what the network remembers of its real data. Weight and bias learn. Made by quantize_model."""

    def train(self, mode=True):
        return super().train(False)


def weight_factor(layer):
    """What a layer's weight is divided by before it is quantized: its input's factor, as it meets the channels of each group, in
    a shape that broadcasts with the weight."""
    factor = layer.input_quantizer.factor
    if not factor.numel():
        return 1.0
    O, groups = len(layer.weight), layer.groups
    return factor.view(groups, 1, -1).expand(-1, O // groups, -1).reshape(O, -1, 1, 1)


def set_grid(layer):
    """Give a layer's weight the grid of its calculate_range, for each output channel."""
    weight = layer.weight.detach() / weight_factor(layer)
    low, high = calculate_range(weight.flatten(1), layer.w_bits, layer.symmetric)
    scale, zero_point, *_ = calculate_qparams(low, high, layer.w_bits, layer.symmetric)
    if layer.input_quantizer.factor.numel():  # 1 / (scale * factor) stays finite for a filter of zeros too
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny / layer.input_quantizer.factor.min().clamp(max=1))
    layer.register_buffer("weight_scale", scale)
    layer.register_buffer("weight_zero_point", zero_point)


def weight_qparams(layer):
    """(scale, zero_point, quant_min, quant_max) of a layer's weight, the first two (C,), one for each output channel."""
    return layer.weight_scale, layer.weight_zero_point, *quant_bounds(layer.w_bits, layer.symmetric)


def integer_weight(layer):
    """A layer's weight in steps of its grid, whole numbers as float32."""
    scale, zero_point, *bounds = weight_qparams(layer)
    scale, zero_point = (broadcast_along(values, layer.weight, 0) for values in (scale, zero_point))
    if layer.input_quantizer.factor.numel():  # this runs in each forward pass
        scale = scale * weight_factor(layer)
    return quantize_tensor(layer.weight, scale, zero_point, *bounds)


# ------------------------------------------------------------------------------------------------ whole models

def copy_without_hooks(model):
    """Deep copy of a model, without the forward and backward hooks that others hung on it; of one made by torch.compile,
    in which hooks do not run reliably, the module that was compiled."""
    model = getattr(model, "_orig_mod", model)
    memo = {id(value): OrderedDict() for module in model.modules()
            for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)}
    return copy.deepcopy(model, memo)


def _start_forward(model, args):
    model.calls_so_far.clear()
    model.calls_so_far.images = args[0].data_ptr() if args and torch.is_tensor(args[0]) else None


def quantize_model(model, w_bits, a_bits, symmetric=False, input_bits=8, input_range=None):
    """Copy of `model` in which each Conv2d is a QuantConv2d and each Linear a QuantLinear; `model` is not changed.

    w_bits, a_bits: 2 to 8. symmetric: signed codes, zero point 0, for weights and activations. input_bits: bits of the
    network's own input (images are 8-bit data), that is of the first layer that runs and of all that take the images
    themselves. input_range: (min, max) that images have in any case, which is widened to what is observed. The copy is in
    evaluation mode, its parameters learn, the grids of its weights are those of calculate_range for the weights of `model`
    and stay, its BatchNorm2d layers stay in evaluation mode for good, and it has no activation ranges yet: see observe, freeze.
    Raises ValueError for other bits, TypeError for a layer with a forward of its own or a computed weight.
    """
    for bits in (w_bits, a_bits, input_bits):
        quant_bounds(bits, symmetric)
    # NumPy's do not load with weights_only.
    w_bits, a_bits, input_bits, symmetric = int(w_bits), int(a_bits), int(input_bits), bool(symmetric)
    student = copy_without_hooks(model).requires_grad_(True).eval()
    student.calls_so_far = Counter()
    for name, module in list(student.named_modules()):
        kind = type(module)
        if isinstance(module, nn.BatchNorm2d) and not isinstance(module, FrozenBatchNorm2d):
            # A subclass keeps its forward, which may hold an activation (torch.save then takes pack's dict alone, no model).
            module.__class__ = FrozenBatchNorm2d if kind is nn.BatchNorm2d else type(kind.__name__, (FrozenBatchNorm2d, kind), {})
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fast path, which reads its layers' weights without calling them
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            base, quantized = (nn.Conv2d, QuantConv2d) if isinstance(module, nn.Conv2d) else (nn.Linear, QuantLinear)
            if "weight" not in module._parameters:
                raise TypeError(f"cannot quantize layer '{name}': its weight is computed from others (parametrized, pruned, "
                                "normalised): remove that first, see torch.nn.utils")
            own = getattr(kind, "_conv_forward", None) is not getattr(base, "_conv_forward", None)
            if own or "forward" in vars(module) or kind.forward not in (base.forward, quantized.forward):
                raise TypeError(f"cannot quantize layer '{name}': {kind.__name__} has a forward of its own")
            # The class changes in place, so every place that holds the layer, and every shared weight, stays shared.
            module.__class__ = quantized
            module.w_bits, module.symmetric = w_bits, symmetric
            module.input_quantizer = InputQuantizer(a_bits, symmetric, input_bits, input_range,
                                                    student.calls_so_far).to(module.weight.device)
            set_grid(module)
    student.register_forward_pre_hook(_start_forward)
    return student


def input_quantizers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, InputQuantizer)}


def observe(model):
    """From here on activations pass in float, and their ranges are tracked. Returns the model, which is to be called itself:
    parts of it, or its forward alone, do not say where a forward pass begins."""
    for quantizer in input_quantizers(model).values():
        quantizer.observing = True
    return model


def freeze(model):
    """Fix the activation ranges observed so far; from here on activations are quantized. Returns the model."""
    for quantizer in input_quantizers(model).values():
        quantizer.freeze()
    return model


def feeding_batch_norms(model):
    """{depthwise or 1 x 1 convolution: batch norm}, by name, of each pair with nothing but ReLU, ReLU6 and padding with zeros
    between, where nothing else uses what runs between, nor the parameters. Empty if torch.fx cannot trace the model's forward."""
    modules, pairs = dict(model.named_modules()), {}
    convolutions = {name for name, layer in modules.items() if isinstance(layer, nn.Conv2d)
                    and (layer.groups == layer.in_channels > 1 or layer.kernel_size == (1, 1))}
    try:
        # of a copy, since a forward may keep what it sees
        graph = fx.symbolic_trace(copy_without_hooks(model)).graph if convolutions else fx.Graph()
    except Exception:  # which values decide, say
        return {}
    runs = Counter(node.target for node in graph.nodes if node.op == "call_module")
    owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))

    def passes(node):  # a factor of each channel on
        return (node.op == "call_module" and isinstance(modules[node.target], (nn.ReLU, nn.ReLU6, nn.ZeroPad2d))
                or node.op == "call_method" and node.target in ("relu", "relu_")
                or node.target in (F.relu, F.relu6, torch.relu)
                or node.target is F.pad and node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value"))
    for node in graph.nodes:
        if node.op == "call_module" and node.target in convolutions:
            layer, source = modules[node.target], node.all_input_nodes[0]
            while passes(source) and len(source.users) == 1:
                source = source.all_input_nodes[0]
            norm = modules.get(source.target) if source.op == "call_module" else None
            if (isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.num_features == layer.in_channels
                    and len(source.users) == runs[source.target] == 1
                    and runs[node.target] == 1 and all(owners[id(p)] == 1 for p in (layer.weight, norm.weight, norm.bias))):
                pairs[node.target] = source.target
    return pairs


@torch.no_grad()
def equalize_channels(student, teacher, batches):
    """Let each channel of a depthwise or 1 x 1 convolution's input use more of the range that all of them share.

    Of one range, of largest magnitude R, most channels use a part. Where a batch norm feeds the convolution
    (feeding_batch_norms), the student's quantizer there multiplies each channel by s, and what of the weight meets it is
    divided by s, and gets a new grid. Integer hardware has s in the batch norm's weight and bias, and in the bound of a ReLU6;
    the student keeps them apart, so that it learns as it would without s. While it observes, no product passes the largest
    value without s. With r the largest magnitude of the channel's own calculate_range (mean over the batches), s is R / r,
    within 1/8 to 8, for a depthwise convolution, whose weight has a scale for each channel and loses nothing; for others,
    whose weight's channels share a scale too, it is the root of that, which leaves half of the unevenness to either. batches:
    images, (B, C, H, W) each. The student has observed its ranges and not trained. Returns the student.
    Source: cross-layer equalization, Nagel et al., arXiv 1906.04721, section 4.1, of the ranges of weights; the root is that of
    SmoothQuant, Xiao et al., arXiv 2211.10438, equation 4 with alpha = 1/2, without the weights' own sizes.
    """
    teacher, r, largest = copy_without_hooks(teacher).eval(), {}, {}
    pairs = feeding_batch_norms(teacher)

    def measure(name):
        def hook(layer, args):
            quantizer = student.get_submodule(name).input_quantizer
            low, high = calculate_range(args[0].transpose(0, 1).flatten(1), quantizer.default_bits, quantizer.symmetric)
            r[name] = r.get(name, 0) + torch.maximum(-low, high) / len(batches)         # (C,)
            largest[name] = max(largest.get(name, 0), args[0].abs().amax().item())
        return hook
    for name in pairs:
        teacher.get_submodule(name).register_forward_pre_hook(measure(name))            # of the copy, which ends here
    for images in batches if pairs else ():
        teacher(images)
    for name, of_channel in r.items():
        layer = student.get_submodule(name)
        of_all = torch.maximum(-layer.input_quantizer.min_val, layer.input_quantizer.max_val)           # (1,)
        s = (of_all / of_channel.clamp(min=1e-12)).clamp(1 / 8, 8)                      # (C,)
        layer.input_quantizer.factor = s if layer.weight.shape[1] == 1 else s.sqrt()
        layer.input_quantizer.limit = largest[name]
        set_grid(layer)
    return student


@torch.no_grad()
def correct_batch_norm(student, teacher, batches):
    """Make the student's batch norms expect what quantization makes of their inputs.

    Rounded weights change the mean and the spread of each channel, and the layers after it see values that they never
    saw: at few bits that is most of what plain quantization loses. batches: images, (B, C, H, W) each, on which the
    inputs of batch norm l have mean m and variance v in the teacher, m' and v' in the student (averages over the batches
    so far, in running order, so that each layer sees those before it corrected). With r^2 = (v' + eps) / (v + eps) and the
    teacher's running statistics mu and var, the student's become
        mu' = m' + r (mu - m)        var' + eps = r^2 (var + eps)
    so that m' + r d is normalised as m + d is in the teacher. r is kept within 1/4 to 4, or a channel that rounding has
    made constant would be blown up once its weights move. Call it while the student observes (activations then pass in
    float, and their ranges go on moving as corrected), and again with its ranges fixed, for what rounded activations
    change (compensate_rounding does that as it goes): it starts from the teacher's statistics each time, so nothing is
    corrected twice. Returns the student.
    Source: of the means, Nagel et al., arXiv 1906.04721, section 4.2, and of both, by the weights alone, Banner et al., arXiv
    1810.05723; here measured on images.
    """
    teacher = copy_without_hooks(teacher).eval()  # in training mode it would change its running statistics
    return run_both(student, teacher, batches, correction_hooks(student, teacher))


def run_both(student, teacher, batches, hooks):
    """Each batch through the teacher and then the student, whose hooks, given by their handles, are gone afterwards. Returns
    the student."""
    try:
        for images in batches:
            teacher(images)
            student(images)
    finally:
        for hook in hooks:
            hook.remove()
    return student


def correction_hooks(student, teacher):
    """Register hooks by which each run of the teacher and then of the student corrects the student's batch norms; returns
    their handles."""
    norms = [[layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None]
             for model in (teacher, student)]
    expected, averages, counts = {}, {}, Counter()  # each by the number of the batch norm, which may run more than once

    def statistics(x):
        mean = x.mean((0, 2, 3), keepdim=True)
        return mean.flatten(), (x - mean).square().mean((0, 2, 3))

    def measure(index):
        return lambda layer, args: expected.setdefault(index, []).append(statistics(args[0]))

    def correct(index):
        def hook(layer, args):
            now = torch.stack([*expected[index].pop(0), *statistics(args[0])])          # (4, C)
            counts[index] += 1
            averages[index] = averages.get(index, 0) + (now - averages.get(index, 0)) / counts[index]
            m, v, student_m, student_v = averages[index]
            r = ((student_v + layer.eps) / (v + layer.eps)).sqrt().clamp(1 / 4, 4)
            original = norms[0][index]
            layer.running_mean.copy_(student_m + r * (original.running_mean - m))
            layer.running_var.copy_((r.square() * (original.running_var + layer.eps) - layer.eps).clamp(min=0))
        return hook
    return [layer.register_forward_pre_hook(kind(index))
            for layers, kind in zip(norms, (measure, correct)) for index, layer in enumerate(layers)]


@torch.no_grad()
def compensate_rounding(student, teacher, batches, prior=100, damping=0.3, places=40_000, block=1024, numbers=2 ** 28):
    """Move the weights of a student that has not trained so that each layer, quantized, gives what it gives in the teacher.

    batches: images, (B, C, H, W) each, all of one size; they go through the student at once, or as many as have no more than
    `numbers` numbers as output of one layer (a gigabyte, of which a few are needed; 334 images of 224 x 224 pixels for a
    ResNet-18). As they pass, the layers are seen to in turn, each by what the layers before it, seen to, make of the images.
    At some `places` places, with x, (n,), a layer's input in the student (quantized, unless the student observes), y its
    output in the teacher, without bias, and W its weight, H = sum of x x^T, and r `prior` times the mean of |x|^2, so
    that W counts as much, in every direction, as `prior` places that lie in it, the weights that fit are
        W + (sum of (y - W x) x^T) (H + r I)^-1
    Then the weights of an output channel are rounded one after the other, and those not yet rounded take up what that did,
        q_j = rounded w_j        w_k -= (w_j - q_j) U_jk / U_jj,  k > j
    with U the upper Cholesky factor of the inverse of H + `damping` times the mean of its diagonal. The weights stay float, as
    those that round to q, and the grids as they are. Layers of more than `block` inputs are done block by block: what
    rounding the earlier ones did is then part of what the next is fitted to. A layer that runs again, or whose weight another
    one has, is left as the first run made it. Batch norms are corrected as they run, see correct_batch_norm. Returns the
    student. prior and damping: above 0.
    Source: GPTQ, Frantar et al., arXiv 2210.17323, section 3, and, of fitting the teacher's outputs, GPTAQ, Li et al., arXiv
    2504.02692; here on generated images, and with the prior.
    """
    images, teacher = torch.cat(list(batches)), copy_without_hooks(teacher).eval()
    sizes, targets = [2], {}
    originals = {layer: teacher.get_submodule(name) for name, layer in quant_layers(student).items()}
    for original in originals.values():                                                 # of the copy, which ends here
        original.register_forward_hook(lambda layer, args, y: sizes.append(y.numel()))
    teacher(images[:2])
    count = min(len(images), max(2, numbers * 2 // max(sizes)))
    images = images[torch.arange(count) * len(images) // count]                         # from every part of every batch
    hooks = correction_hooks(student, teacher)

    def keep(layer, args, y):
        skip = max(1, round((y.numel() / len(layer.weight) / places) ** 0.5))           # in height and in width
        if isinstance(layer, nn.Conv2d):
            y = y[:, :, ::skip, ::skip].unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3, 4).flatten(2)
        else:
            y = y.reshape(1, -1, y.shape[-1]).mT[:, :, ::skip ** 2]
        bias = 0 if layer.bias is None else layer.bias.view(len(y), -1, 1)
        targets.setdefault(layer.weight, (skip, (y.float() - bias).cpu()))              # (groups, O / groups, places)

    def compensate(layer, weight):
        def hook(quantizer, args, result):
            if weight not in targets:
                return
            (skip, y), x = targets.pop(weight), result[0] * result[1]
            if isinstance(layer, nn.Conv2d):
                mode, padding = layer.padding_mode, layer.padding
                if mode != "zeros" or isinstance(padding, str):
                    x = F.pad(x, layer._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode)
                    padding = 0
                x = F.unfold(x, layer.kernel_size, layer.dilation, padding, [skip * stride for stride in layer.stride])
                x = x.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)   # (groups, n, places)
            else:
                x = x.reshape(1, -1, x.shape[-1]).mT[:, :, ::skip ** 2]
            y, size = y.to(x), x.square().sum(1).mean(1)                                # mean |x|^2, (groups,)
            if (size.sum() + y.square().sum()).isfinite():                              # else the images are NaN
                factor = weight_factor(layer)
                w = (layer.weight / factor).flatten(1).unflatten(0, (len(x), -1))       # (groups, O / groups, n)
                layer.weight.copy_(compensated(layer, w, x, y, prior * size, damping, block).view(weight.shape) * factor)
        return hook
    for layer, original in originals.items():
        hooks.append(original.register_forward_hook(keep))
        hooks.append(layer.input_quantizer.register_forward_hook(compensate(layer, original.weight)))  # its weight is used later
    return run_both(student, teacher, [images], hooks)


def compensated(layer, w, x, y, r, damping, block):
    """A layer's weights w, as compensate_rounding moves them; shapes as there."""
    qparams, rest = weight_qparams(layer), y - w @ x                                    # what is yet to be made up for
    r, w = r.clamp(min=1e-12)[:, None, None].double(), w.double()
    for start in range(0, w.shape[2], block):
        part = slice(start, start + block)
        h = (x[:, part] @ x[:, part].mT).double()                                       # as it is near to singular
        eye, mean = torch.eye(h.shape[1]).to(h), h.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)[:, None, None]
        v = w[:, :, part] + torch.linalg.solve(h + r * eye, (x[:, part] @ rest.mT).double()).mT
        u = torch.linalg.cholesky(torch.linalg.inv(h + damping * mean * eye), upper=True)[:, None]
        q = torch.empty_like(v)
        for j in range(v.shape[2]):
            q[:, :, j] = fake_quantize(v[:, :, j].float().flatten(), *qparams, axis=0).view_as(v[:, :, j])
            v[:, :, j + 1:] -= ((v[:, :, j] - q[:, :, j]) / u[:, :, j, j])[:, :, None] * u[:, :, j, j + 1:]
        rest -= (q - w[:, :, part]).float() @ x[:, part]
        w[:, :, part] = v
    return w.float()


# ------------------------------------------------------------------------------------------------ integers on disk

def pack_bits(codes, bits):
    """(N,) integers 0 .. 2^bits - 1 -> (ceil(N / 8) * bits,) uint8: eight codes in `bits` bytes, lowest bits first."""
    codes = F.pad(codes.flatten().long(), (0, -codes.numel() % 8)).view(-1, 8)
    words = sum(codes[:, i] << (bits * i) for i in range(8))
    return torch.stack([(words >> (8 * i)) & 255 for i in range(bits)], 1).to(torch.uint8).flatten()


def unpack_bits(packed, bits, count):
    """Inverse of pack_bits: (count,) int64."""
    packed = packed.long().view(-1, bits)
    words = sum(packed[:, i] << (8 * i) for i in range(bits))
    return torch.stack([(words >> (bits * i)) & (2 ** bits - 1) for i in range(8)], 1).flatten()[:count]


def quant_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, (QuantConv2d, QuantLinear))}


def float_entries(model, names):
    """The state dict without what quantize_model adds, and without the weights of the layers called `names`, under any name."""
    added = {f"{name}.{key}".lstrip(".") for name, layer in model.named_modules(remove_duplicate=False)
             if isinstance(layer, (QuantConv2d, QuantLinear)) for key in layer.state_dict()
             if key.startswith(("weight_scale", "weight_zero_point", "input_quantizer."))}
    packed = {model.get_submodule(name).weight.data_ptr() for name in names}
    return {key: value for key, value in model.state_dict().items() if torch.is_tensor(value) and key not in added
            and not (value.numel() and value.data_ptr() in packed)}


def pack(model):
    """The quantized model as integers: a dict of tensors, numbers and strings for torch.save (weights_only=True).

    "layers": for each layer its weight's codes (w_bits each, eight codes in w_bits bytes), shape, bits, scale (C,) and
    zero_point (C,), and its input's bits, scale and zero_point (calls,) and factor, of each channel or none. "rest": everything
    else, in float, also a layer that never ran itself (an auxiliary head, one of which only the weight is used), as it is not
    quantized then. Raises RuntimeError if no layer has an activation range, or one that was observed and not fixed: see
    observe, freeze.
    """
    quantizers = input_quantizers(model).values()
    if not any(q.bits for q in quantizers) or any(len(q.bits) != len(q.scale) for q in quantizers):
        raise RuntimeError("nothing to pack: call observe(model), run images through it, then freeze(model)")
    layers = {}
    with torch.no_grad():
        for name, layer in quant_layers(model).items():
            if not layer.input_quantizer.bits:
                continue
            scale, zero_point, quant_min, _ = weight_qparams(layer)
            codes = integer_weight(layer).to(torch.int32) + broadcast_along(zero_point, layer.weight, 0)
            quantizer = layer.input_quantizer
            layers[name] = {
                "codes": pack_bits(codes - quant_min, layer.w_bits).cpu(), "shape": list(layer.weight.shape),
                "bits": layer.w_bits, "symmetric": layer.symmetric, "scale": scale.cpu().clone(),
                "zero_point": (zero_point - quant_min).to(torch.uint8).cpu(), "input_bits": list(quantizer.bits),
                "input_factor": quantizer.factor.cpu().clone(),
                "input_scale": quantizer.scale.cpu().clone(), "input_zero_point": quantizer.zero_point.cpu().clone()}
    return {"layers": layers,
            "rest": {key: value.detach().cpu().clone() for key, value in float_entries(model, layers).items()}}


def unpack(packed, model):
    """The quantized model again, from what `pack` gave and a float model of the same architecture (left as it is).

    Its outputs equal those of the packed model exactly (unless the model uses the weight of a quantized layer a second time, in
    float, as an embedding tied to it does: here that is rounded too). Raises ValueError if the architecture is another one.
    """
    layers, rest = packed["layers"], packed["rest"]
    some = next(iter(layers.values()), {"bits": 8, "symmetric": False})
    student = quantize_model(model, some["bits"], 8, some["symmetric"]).float()
    quantized, state = quant_layers(student), student.state_dict()
    found = {name: list(quantized[name].weight.shape) for name in layers if name in quantized}
    if found != {name: layer["shape"] for name, layer in layers.items()} or float_entries(student, layers).keys() != rest.keys():
        raise ValueError("the packed student is of another architecture than the model")
    state.update(rest)
    student.load_state_dict(state)
    with torch.no_grad():
        for name, data in layers.items():
            layer, device = quantized[name], quantized[name].weight.device
            layer.w_bits, layer.symmetric = data["bits"], data["symmetric"]
            quant_min, _ = quant_bounds(layer.w_bits, layer.symmetric)
            codes = unpack_bits(data["codes"], layer.w_bits, layer.weight.numel()).view(data["shape"])
            steps = codes - broadcast_along(data["zero_point"], codes, 0)
            quantizer = layer.input_quantizer
            quantizer.factor = data.get("input_factor", torch.empty(0)).to(device)  # older files have none
            layer.weight.copy_((steps * broadcast_along(data["scale"], codes, 0)).to(device) * weight_factor(layer))
            layer.weight_scale = data["scale"].to(device)
            layer.weight_zero_point = (data["zero_point"].to(torch.int32) + quant_min).to(device)
            quantizer.bits, quantizer.symmetric = list(data["input_bits"]), layer.symmetric
            quantizer.scale, quantizer.zero_point = data["input_scale"].to(device), data["input_zero_point"].to(device)
    return student
