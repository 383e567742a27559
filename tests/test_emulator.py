"""The CUDA kernels' own source, run on the CPU under AddressSanitizer (tests/emulator).

Where values are small integers every sum is exact, whatever its order: results are then compared
bit for bit.
"""

import pytest
import torch
from emulator import Emulator, EmulatorError, build
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from moe_ops import reference

FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
MACHINES = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 1 << 30),
        sm_count=st.sampled_from([1, 3, 132]),
        # What an A100, an RTX 3090 and an H100 have.
        smem_per_block=st.sampled_from([163 << 10, 99 << 10, 227 << 10]),
    )
)
SEEDS = st.integers(0, 1 << 30)
EPSILON = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def examples(count):
    return settings(
        max_examples=count,
        # Failures are shown as they were drawn: the cases are small, and test_planted_bug has many.
        phases=[Phase.explicit, Phase.generate],
        report_multiple_bugs=False,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def emulator():
    emulator = Emulator(build())
    yield emulator
    emulator.close()


def twice(operator, *args, seed=0, **kwargs):
    """The same bits whatever order the threads take turns in."""
    first = operator(*args, seed=seed, **kwargs)
    second = operator(*args, seed=seed + 1, **kwargs)
    for x, y in zip(first, second) if isinstance(first, list) else [(first, second)]:
        x, y = (t.clone(memory_format=torch.contiguous_format).view(-1) for t in (x, y))
        x, y = x.view(torch.uint8), y.view(torch.uint8)
        assert torch.equal(x, y)
    return first


class Random:
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, *shape, low=-2, high=2, dtype=torch.float32):
        return torch.randint(low, high + 1, shape, generator=self.generator).to(dtype)

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.generator).to(dtype)

    def expert_offsets(self, experts, rows, kind):
        if kind == "malformed":
            return self.integers(experts + 1, low=-5, high=rows + 5, dtype=torch.int32)
        favourite = self.integers(1, low=0, high=experts - 1, dtype=torch.int64)
        ids = self.integers(rows, low=0, high=experts, dtype=torch.int64)  # `experts`: not here
        if kind == "skewed":
            ids = torch.where(self.integers(rows, low=0, high=3) > 0, favourite, ids)
        counts = torch.bincount(ids, minlength=experts + 1)[:experts]
        return torch.cat([torch.zeros(1), counts.cumsum(0)]).int()


OFFSETS = st.sampled_from(["even", "skewed", "malformed"])


def held_rows(expert_offsets, rows):
    held = torch.zeros(rows, dtype=torch.bool)
    for of_expert in reference.row_ranges(expert_offsets, rows):
        held[of_expert] = True
    return held


# ---- the emulator itself ----


@pytest.mark.parametrize("b_is_k_by_n", [False, True])
def test_toy_gemm(emulator, b_is_k_by_n):
    random = Random(0)
    a, b = (random.integers(rows, 64, dtype=torch.bfloat16) for rows in (48, 32))
    out = twice(emulator.toy_gemm, a, b.T.contiguous() if b_is_k_by_n else b,
                b_is_k_by_n=b_is_k_by_n)  # fmt: skip
    assert torch.equal(out.double(), a.double() @ b.double().T)


def test_toy_scan(emulator):
    x = Random(0).integers(1000, low=0, high=9, dtype=torch.int32)
    assert torch.equal(twice(emulator.toy_scan, x), x.cumsum(0).int())


@examples(60)
@given(st.integers(1, 300) | st.integers(1, 2**31 - 1), SEEDS)
def test_toy_divide(emulator, divisor, seed):
    """Where the quotient changes, and anywhere."""
    random = Random(seed)
    quotients = torch.randint((2**31 - 1) // divisor + 1, (300,), generator=random.generator)
    x = torch.cat([quotients * divisor, quotients * divisor + divisor - 1,
                   torch.randint(2**31, (300,), generator=random.generator)])  # fmt: skip
    x = x.clamp(max=2**31 - 1).int()
    assert torch.equal(emulator.toy_divide(x, divisor), x // divisor)


@examples(25)
@given(st.sampled_from([1, 8, 600]), st.integers(0, 120), st.integers(1, 3),
       st.sampled_from([1, 2, 16]), OFFSETS, SEEDS, MACHINES)  # fmt: skip
@example(1, 460, 2, 2, "skewed", 0, dict(seed=0, sm_count=1))  # tiles of four units and of three
def test_toy_tiles(emulator, experts, rows, column_tiles, group, kind, seed, machine):
    offsets = Random(seed).expert_offsets(experts, rows, kind)
    out = twice(emulator.toy_tiles, offsets, rows=rows, column_tiles=column_tiles, group=group,
                **machine)  # fmt: skip
    expected = torch.full_like(out, -1)
    for e, of_expert in enumerate(reference.row_ranges(offsets, rows)):
        expected[of_expert] = e
    assert torch.equal(out, expected)


# ---- topk_route ----


@st.composite
def routes(draw):
    num_groups = draw(st.sampled_from([1, 1, 2, 4, 40]))  # 40: more than lanes
    topk_groups = draw(st.integers(1, num_groups))
    group = draw(st.integers(1, draw(st.sampled_from([8, 40, 300] if num_groups < 40 else [8]))))
    return dict(
        tokens=draw(st.integers(0, 40)),
        experts=num_groups * group,
        topk=draw(st.integers(1, min(22, topk_groups * group))),
        num_groups=num_groups,
        topk_groups=topk_groups,
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=draw(st.booleans()),
        scaling=draw(st.sampled_from([1.0, 2.5])),
    )


@examples(60)
@given(routes(), FLOATS, st.none() | FLOATS, SEEDS, MACHINES, st.booleans())
def test_topk_route(emulator, route, dtype, bias, seed, machine, tiny_memory):
    random = Random(seed)
    shape = route.pop("tokens"), route.pop("experts")
    # Few different values: many ties, and whether two sums are equal is no matter of rounding.
    logits = random.integers(*shape, low=0, high=9, dtype=dtype) * 0.25
    for extreme in (torch.nan, -torch.inf):
        logits[random.integers(*shape, low=0, high=20) == 0] = extreme
    if shape[0]:
        logits[0] = torch.nan
    if bias is not None:
        bias = random.integers(shape[1], low=-1, high=1, dtype=bias) * 0.125
    if tiny_memory:
        machine["smem_per_block"] = 2 << 10
    weights, ids = twice(emulator.topk_route, logits, bias=bias, **route, **machine)
    expected_weights, expected_ids = reference.topk_route(logits, correction_bias=bias, **route)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)


# ---- sort_by_expert ----


@examples(60)
@given(st.data(), st.sampled_from([torch.int32, torch.int64]), SEEDS, MACHINES)
def test_sort_by_expert(emulator, data, dtype, seed, machine):
    experts = data.draw(st.sampled_from([1, 2, 7, 8, 60, 512, 1100]))
    slots = data.draw(st.integers(0, data.draw(st.sampled_from([5, 100, 3000]))))
    expert_offset = data.draw(st.sampled_from([0, experts, 3]))
    if data.draw(st.booleans()):
        machine["smem_per_block"] = 4 << 10  # 512 experts' counts don't fit
    random = Random(seed)
    ids = random.integers(slots, low=-2, high=experts + 2, dtype=dtype) + expert_offset
    if data.draw(st.booleans()):  # all tokens to one expert, but for a few
        ids = torch.where(random.integers(slots, low=0, high=9) > 0, expert_offset, ids).to(dtype)
    if dtype == torch.int64 and slots:
        ids[random.integers(1, low=0, high=slots - 1, dtype=dtype)] = (1 << 40) + expert_offset
    topk, height = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.sampled_from([0, 16, 160]))
    unit_log2 = 4 if height == 16 else 5
    weights = random.integers(slots, dtype=data.draw(FLOATS))
    offsets, sorted_slots, source_rows, row_weights, *tiles = twice(
        emulator.sort_by_expert, ids, experts, expert_offset, topk=topk, topk_weights=weights,
        tile_height=height, tile_unit_log2=unit_log2, **machine
    )  # fmt: skip
    expected_offsets, expected_slots = reference.sort_by_expert(ids, experts, expert_offset)
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(sorted_slots, expected_slots)
    assert torch.equal(source_rows, sorted_slots // topk)
    assert torch.equal(row_weights, weights.float()[sorted_slots.long()])
    if height and slots:
        expected_tiles = []  # in groups of two
        for e, of_expert in enumerate(reference.row_ranges(offsets, slots)):
            begin, rows = of_expert.start, of_expert.stop - of_expert.start
            if rows <= 0:
                continue
            tiles_of_expert = -(-rows // height)
            unit = 1 << unit_log2
            each, longer = divmod(-(-rows // unit), tiles_of_expert)
            heights = [unit * (each + (i < longer)) for i in range(tiles_of_expert)]
            assert max(heights) <= height
            for first in range(0, tiles_of_expert, 2):
                group = heights[first : first + 2]
                rows = min(sum(group), of_expert.stop - begin)
                longer_of_group = group.count(unit * (each + 1))
                expected_tiles += [
                    [e, begin, rows, i | len(group) << 8 | each << 16 | longer_of_group << 24]
                    for i in range(len(group))
                ]
                begin += rows
        assert tiles[0][0, :3].tolist() == [len(expected_tiles), 0, 0]
        assert tiles[0][1 : 1 + len(expected_tiles)].tolist() == expected_tiles


def test_sort_by_expert_many_chunks(emulator):
    """Two kernels: chunks of 256 slots, or of an eighth of the experts, whose places don't fit
    into shared memory."""
    for slots, experts in ((9000, 3), (20_000, 600), (2000, 4000)):
        ids = Random(slots).integers(slots, low=-1, high=experts, dtype=torch.int32)
        offsets, sorted_slots = twice(
            emulator.sort_by_expert, ids, experts, smem_per_block=16 << 10, sm_count=2
        )
        expected_offsets, expected_slots = reference.sort_by_expert(ids, experts)
        assert torch.equal(offsets, expected_offsets)
        assert torch.equal(sorted_slots, expected_slots)


@pytest.mark.parametrize("experts", [8, 600, 1300, 3000, 30_000])
def test_sort_by_expert_needs_no_more_for_fewer_slots(emulator, experts):
    """A long input's last piece is shorter than those that its scratch was made for."""
    slots = torch.arange(0, 40_000, 31, dtype=torch.int32)
    for smem_per_block in (99 << 10, 163 << 10, 227 << 10):
        counts = emulator.sort_by_expert_counts(slots, experts, smem_per_block=smem_per_block)
        assert (counts.diff() >= 0).all()


# ---- grouped_gemm ----


def gemm_reference(a, b, expert_offsets, *, rows, bias=None, source_rows=None,
                   activation="identity", gate_layout="gate_up", row_weights=None,
                   out_rows=None, **parameters):  # fmt: skip
    """In float64, before the rows are scattered."""
    gated = reference.ACTIVATIONS[activation].gated
    out = torch.zeros(rows, b.shape[1] // (2 if gated else 1), dtype=torch.float64)
    for e, of_expert in enumerate(reference.row_ranges(expert_offsets, rows)):
        x = a[of_expert] if source_rows is None else a[source_rows[of_expert].long()]
        h = x.double() @ b[e].double().T
        if bias is not None:
            h += bias[e].double()
        gate, up = reference.split_branches(h, gate_layout) if gated else (h, None)
        scalars = {name: value[e].double() for name, value in parameters.items()}
        out[of_expert] = reference.activate(gate, up, activation, **scalars)
        if row_weights is not None:
            out[of_expert] *= row_weights[of_expert].double().unsqueeze(1)
    return out


SIZES = st.one_of(
    st.integers(1, 40), st.sampled_from([8, 16, 64, 72, 136]), st.integers(40, 150)
)  # fmt: skip


@st.composite
def gemms_of_whole_vectors(draw):
    """As gemms(), for the kernels that want rows of whole 16-byte vectors; tiles of all heights."""
    multiples = st.integers(1, 45).map(lambda i: 8 * i)
    experts = draw(st.sampled_from([1, 3, 8]))
    return dict(
        rows=draw(st.sampled_from([3, 12, 24, 64, 150])) * draw(st.sampled_from([1, experts])),
        n=draw(multiples),
        k=draw(multiples),
        experts=experts,
        dtype=draw(st.sampled_from([torch.float16, torch.bfloat16])),
        out_dtype=draw(st.sampled_from([None, torch.float32])),
        offsets=draw(OFFSETS),
        gathered=draw(st.booleans()),
        weighted=draw(st.booleans()),
        bias=draw(st.sampled_from([None, "float32", "same"])),
        n_major=False,
        a_padding=draw(st.sampled_from([0, 8])),
        out_padding=draw(st.sampled_from([0, 8])),
        misaligned=[],
        zero_other_rows=draw(st.booleans()),
        columns=draw(st.sampled_from([None, 4096])),
        sm90=draw(st.booleans()),
        scattered=draw(st.booleans()),
    )


@st.composite
def gemms(draw):
    """Arguments of grouped_gemm, all but `a` and `b` ready."""
    rows = draw(st.one_of(st.integers(1, 90), st.integers(1, 90), st.sampled_from([200, 400])))
    experts = draw(st.sampled_from([1, 3, 8]))
    return dict(
        rows=rows,
        n=draw(SIZES),
        k=draw(SIZES),
        experts=experts,
        dtype=draw(FLOATS),
        out_dtype=draw(st.sampled_from([None, torch.float32])),
        offsets=draw(OFFSETS),
        gathered=draw(st.booleans()),
        weighted=draw(st.booleans()),
        bias=draw(st.sampled_from([None, "float32", "same"])),
        n_major=draw(st.booleans()),
        a_padding=draw(st.sampled_from([0, 0, 8, 1])),
        out_padding=draw(st.sampled_from([0, 0, 8, 1])),
        misaligned=draw(st.lists(st.sampled_from(["a", "b", "out"]), unique=True)),
        zero_other_rows=draw(st.booleans()),
        columns=draw(st.sampled_from([None, 4096])),
        scattered=draw(st.booleans()),
    )


def gemm_inputs(case, random, branches=1):
    """Small integers; NaN wherever nobody has business to look."""
    dtype, rows, n, k, experts = (case[x] for x in ("dtype", "rows", "n", "k", "experts"))
    offsets = random.expert_offsets(experts, rows, case["offsets"])
    held = held_rows(offsets, rows)
    sources = None
    tokens = rows
    if case["gathered"]:
        tokens = rows // 2 + 1
        sources = random.integers(rows, low=0, high=tokens - 1, dtype=torch.int32)
    a = random.integers(tokens, k + case["a_padding"], dtype=dtype)
    a[:, k:] = torch.nan
    b = random.integers(experts, branches * n, k, dtype=dtype)
    for e, of_expert in enumerate(reference.row_ranges(offsets, rows)):
        if of_expert.start == of_expert.stop:
            b[e] = torch.nan
    if sources is None:
        a[~held] = torch.nan
    if case["n_major"]:
        b = b.mT.contiguous().mT
    bias = case["bias"] and random.integers(
        experts, branches * n, dtype=torch.float32 if case["bias"] == "float32" else dtype
    )
    arguments = dict(rows=rows, bias=bias, source_rows=sources)
    if case["weighted"]:
        arguments["row_weights"] = random.integers(rows, low=1, high=4) * 0.25
    if case["scattered"]:  # which the layer's second product wants, and no zeroed rows
        case["zero_other_rows"] = False
        arguments["out_rows"] = torch.randperm(rows, generator=random.generator).int()
    return a[:, :k], b, offsets, held, arguments


def gemm_places(case):
    """What isn't part of the mathematics."""
    size = case["dtype"].itemsize
    out_size = (case["out_dtype"] or case["dtype"]).itemsize
    return dict(
        offsets={x: out_size if x == "out" else size for x in case["misaligned"]},
        **{x: case[x] for x in ("out_dtype", "out_padding", "zero_other_rows")},
        columns=case.get("columns"),
        sm90=case.get("sm90", False),
        split_log2=case.get("split_log2", 0),
    )


def gathered(out, out_rows=None, **_):
    """The product's rows where they were scattered to."""
    return out if out_rows is None else out[out_rows.long()]


def check_unheld_rows(out, held, zeroed):
    others = out[~held].float()
    assert (others == 0).all() if zeroed else others.isnan().all()


def machine_for(case, machine):
    """wgmma's kernels are for GPUs with Hopper's shared memory alone."""
    return machine | dict(smem_per_block=227 << 10) if case.get("sm90") else machine


def check_grouped_gemm(emulator, case, seed, machine):
    machine = machine_for(case, machine)
    a, b, offsets, held, arguments = gemm_inputs(case, Random(seed))
    out = twice(emulator.grouped_gemm, a, b, offsets, **arguments, **gemm_places(case), **machine)
    # Where k is split a row's sums lie side by side.
    out = gathered(out.unflatten(1, (1 << case.get("split_log2", 0), -1)).sum(1), **arguments)
    expected = gemm_reference(a, b, offsets, **arguments)
    assert torch.equal(out[held], expected[held].to(out.dtype))
    check_unheld_rows(out, held, case["zero_other_rows"])


@examples(40)
@given(gemms(), SEEDS, MACHINES)
def test_grouped_gemm(emulator, case, seed, machine):
    check_grouped_gemm(emulator, case, seed, machine)


WGMMA = dict(rows=300, n=264, k=136, experts=2, dtype=torch.float16, out_dtype=None,
             offsets="even", gathered=True, weighted=True, bias=None, n_major=False, a_padding=0,
             out_padding=0, misaligned=[], zero_other_rows=False, columns=4096, scattered=True,
             sm90=True)  # fmt: skip
# By mma.sync: most experts have a few rows, fewer than their tile's first warps take.
FEW_ROWS = WGMMA | dict(rows=500, n=72, k=72, experts=8, offsets="skewed", sm90=False)


@examples(30)
@given(gemms_of_whole_vectors(), st.sampled_from([0, 0, 1, 2]), SEEDS, MACHINES)
@example(WGMMA, 0, 0, dict(seed=0, sm_count=1))
@example(WGMMA | dict(bias="float32"), 1, 0, dict(seed=0, sm_count=1))
@example(WGMMA | dict(n=376), 0, 0, dict(seed=0, sm_count=3))  # in tiles of 192 x 128
@example(FEW_ROWS, 0, 0, dict(seed=0, sm_count=1))
@example(FEW_ROWS | dict(bias="float32"), 2, 0, dict(seed=0, sm_count=1))
def test_grouped_gemm_of_whole_vectors(emulator, case, split_log2, seed, machine):
    if split_log2:  # k in so many parts
        case = case | dict(k=case["k"] << split_log2, split_log2=split_log2,
                           out_dtype=torch.float32, zero_other_rows=False)  # fmt: skip
    check_grouped_gemm(emulator, case, seed, machine)


@pytest.mark.parametrize("sm90", [False, True])
def test_grouped_gemm_claims_late(emulator, sm90):
    case = WGMMA | dict(k=1544, sm90=sm90)  # long enough, and more tiles than blocks
    check_grouped_gemm(emulator, case, 0, dict(seed=0, sm_count=2))


def test_the_same_bits_from_both_kernels(emulator):
    """A bias that all but cancels, and `a` aligned or not: the sums are made and end alike."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, 72, generator=generator).half()
    b = torch.randn(2, 24, 72, generator=generator).half()
    bias = -(a[:1].float() @ b[0].float().T).expand(2, 24).contiguous()
    offsets = torch.tensor([0, 4, 7], dtype=torch.int32)
    aligned = emulator.grouped_gemm(a, b, offsets, bias=bias)
    apart = emulator.grouped_gemm(a, b, offsets, bias=bias, offsets=dict(a=2))
    assert torch.equal(aligned, apart)


@pytest.mark.parametrize("gate_layout", reference.GATE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_gemm_gates_across_vectors(emulator, dtype, gate_layout):
    """b with k as its slow axis: of a vector the gates or the ups alone belong together."""
    random = Random(0)
    a, b = random.integers(7, 40, dtype=dtype), random.integers(2, 2 * 16, 40, dtype=dtype) / 8
    arguments = dict(activation="swiglu", gate_layout=gate_layout)
    offsets = torch.tensor([0, 4, 7], dtype=torch.int32)
    expected = emulator.grouped_gemm(a, b, offsets, **arguments)
    out = emulator.grouped_gemm(a, b.mT.contiguous().mT, offsets, **arguments)
    assert torch.equal(out, expected)


@examples(35)
@given(gemms() | gemms_of_whole_vectors(), st.sampled_from(list(reference.ACTIVATIONS)),
       st.sampled_from(reference.GATE_LAYOUTS), st.booleans(), SEEDS, MACHINES)  # fmt: skip
def test_grouped_gemm_activation(
    emulator, case, activation, gate_layout, parameters_given, seed, machine
):
    random, machine = Random(seed), machine_for(case, machine)
    branches = 2 if reference.ACTIVATIONS[activation].gated else 1
    a, b, offsets, held, arguments = gemm_inputs(case, random, branches)
    a, b = a / 4, (b.mT / 4).mT  # exact still, and within the activations' bends
    arguments |= dict(activation=activation, gate_layout=gate_layout)
    if parameters_given:
        for name in reference.ACTIVATIONS[activation].defaults:
            arguments[name] = random.integers(case["experts"], low=1, high=4) * 0.5
    out = twice(emulator.grouped_gemm, a, b, offsets, **arguments, **gemm_places(case), **machine)
    out = gathered(out, **arguments)
    expected = gemm_reference(a, b, offsets, **arguments)
    tolerance = EPSILON[out.dtype]
    torch.testing.assert_close(out[held].double(), expected[held], rtol=tolerance, atol=tolerance)
    check_unheld_rows(out, held, case["zero_other_rows"])


@examples(40)
@given(gemms() | gemms_of_whole_vectors(), st.integers(1, 40), st.booleans(), SEEDS, MACHINES)
@example(WGMMA, 9, True, 0, dict(seed=0, sm_count=2))
@example(WGMMA | dict(sm90=False, rows=500), 9, True, 0, dict(seed=0, sm_count=1))
def test_grouped_gemm_second_waits(emulator, case, vectors, gated, seed, machine):
    """A layer's first product counts what it has written of each row tile, and the second goes by
    that: by nothing less."""
    random, n = Random(seed), case["n"]
    whole = "sm90" in case  # vectors, in both products
    if whole:
        case = case | dict(out_dtype=None)
    case = case | dict(scattered=False, zero_other_rows=False, columns=case["columns"] or n)
    a, b, offsets, held, arguments = gemm_inputs(case, random, 2 if gated else 1)
    places = gemm_places(case) | machine_for(case, machine)
    h, progress = emulator.grouped_gemm(
        a, b, offsets, **arguments, activation="reglu" if gated else "identity", progress=True,
        **places)  # fmt: skip
    begins = [r.start for r in reference.row_ranges(offsets, case["rows"]) if r.stop > r.start]
    assert (progress[begins] >= n).all()
    if whole:  # a tile's columns, rounded up, where a tile begins, and nothing elsewhere
        assert ((progress < n + 256) | (progress == 0x7F7F7F7F)).all()
    h = h / 16
    b = random.integers(case["experts"], 8 * vectors, n, dtype=h.dtype)
    places = machine_for(case, machine) | dict(
        rows=case["rows"], columns=case["columns"], sm90=places["sm90"], is_second=True,
        zero_other_rows=False)  # fmt: skip
    if whole and n % 16 == 0:
        places |= dict(split_log2=1, out_dtype=torch.float32)
    out = twice(emulator.grouped_gemm, h, b, offsets, progress=progress, **places)
    out = out.unflatten(1, (1 << places.get("split_log2", 0), -1)).sum(1)
    expected = gemm_reference(h, b, offsets, rows=case["rows"])
    tolerance = EPSILON[out.dtype]
    torch.testing.assert_close(out[held].double(), expected[held], rtol=tolerance, atol=tolerance)
    if whole and begins:
        progress[begins[-1]] = n - 1
        with pytest.raises(EmulatorError, match="never ends"):
            emulator.grouped_gemm(h, b, offsets, progress=progress, **places)


def test_grouped_gemm_many_experts(emulator):
    """More of them than a block looks at in one go."""
    case = dict(rows=200, n=8, k=8, experts=2500, dtype=torch.bfloat16, out_dtype=None,
                gathered=True, weighted=True, scattered=False, bias="float32", n_major=False,
                a_padding=0, out_padding=0, misaligned=[], zero_other_rows=True)  # fmt: skip
    for offsets in ("even", "skewed", "malformed"):
        check_grouped_gemm(emulator, case | dict(offsets=offsets), 0, dict(sm_count=3))


# ---- grouped_gemm_wgrad ----


@examples(25)
@given(st.data(), FLOATS, OFFSETS, SEEDS, MACHINES)
def test_grouped_gemm_wgrad(emulator, data, dtype, kind, seed, machine):
    rows, experts = data.draw(st.integers(0, 90)), data.draw(st.sampled_from([1, 3, 8]))
    m, n = data.draw(SIZES), data.draw(SIZES)
    random = Random(seed)
    offsets = random.expert_offsets(experts, rows, kind)
    paddings = data.draw(st.lists(st.sampled_from([0, 0, 8, 1]), min_size=2, max_size=2))
    a, b = (random.integers(rows, size + padding, dtype=dtype)[:, :size]
            for size, padding in zip((m, n), paddings))  # fmt: skip
    held = held_rows(offsets, rows)
    a[~held] = b[~held] = torch.nan
    misaligned = data.draw(st.lists(st.sampled_from(["a", "b", "out"]), unique=True))
    out = twice(emulator.grouped_gemm_wgrad, a, b, offsets, out_dtype=torch.float32,
                offsets={x: 4 if x == "out" else dtype.itemsize for x in misaligned},
                **machine)  # fmt: skip
    expected = reference.grouped_gemm_wgrad(a, b, offsets, compute_dtype=torch.float64)
    assert torch.equal(out.double(), expected)


# ---- grouped_gemv ----


@st.composite
def gemvs(draw):
    return dict(
        dtype=draw(st.sampled_from([torch.float16, torch.bfloat16])),
        out_dtype=draw(st.none() | FLOATS),
        tokens=draw(st.sampled_from([1, 1, 2, 3])),
        topk=draw(st.sampled_from([1, 2, 3, 10, 16])),
        experts=draw(st.sampled_from([1, 3, 8])),
        expert_offset=draw(st.sampled_from([0, 3])),
        ids_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        n=8 * draw(st.integers(1, 9)),
        # Less than all threads have vectors for, and more.
        k=8 * draw(st.integers(1, 40) | st.sampled_from([256, 300, 600])),
        bias=draw(st.none() | FLOATS),
        padding=8 * draw(st.sampled_from([0, 0, 1])),
        out_padding=draw(st.sampled_from([0, 3])),
        in_order=draw(st.booleans()),
    )


def gemv_inputs(case, random, branches=1):
    """a's rows, b, the ids, their local experts and which are held, arguments. What none of the
    slots want is NaN."""
    tokens, topk, experts = case["tokens"], case["topk"], case["experts"]
    ids = random.integers(tokens, topk, low=-1, high=experts, dtype=case["ids_dtype"])
    held = (ids >= 0) & (ids < experts)
    local = ids.long().clamp(0, experts - 1)
    n, k = branches * case["n"], case["k"]
    b = random.integers(experts, n, k + case["padding"], dtype=case["dtype"])[..., :k]
    bias = case["bias"] and random.integers(experts, n, dtype=case["bias"])
    for e in range(experts):
        if e not in ids:
            b[e] = torch.nan
            if bias is not None:
                bias[e] = torch.nan
    arguments = dict(bias=bias, out_dtype=case["out_dtype"], out_padding=case["out_padding"],
                     expert_offset=case["expert_offset"], in_order=case["in_order"])  # fmt: skip
    return b, ids + case["expert_offset"], local, held, arguments


@examples(60)
@given(gemvs(), SEEDS, MACHINES)
def test_grouped_gemv(emulator, case, seed, machine):
    """Of a token's slots: each by itself, and added up, rounded before if it is in order."""
    random, (tokens, topk) = Random(seed), (case["tokens"], case["topk"])
    b, ids, local, held, arguments = gemv_inputs(case, random)
    x = random.integers(tokens, case["k"] + case["padding"], dtype=case["dtype"])[:, : case["k"]]
    product = b.double()[local] @ x[:, None, :, None].double()
    if arguments["bias"] is not None:
        product += arguments["bias"].double()[local][..., None]
    product = product.flatten(0, 1)[..., 0]
    out = twice(emulator.grouped_gemv, x, b, ids, **arguments, **machine)
    expected, held_rows = product.to(out.dtype), held.flatten()
    assert torch.equal(out[held_rows], expected[held_rows])

    rows = x[:, None].expand(tokens, topk, -1).reshape(tokens * topk, -1).clone()
    weights = random.integers(tokens, topk, dtype=torch.float32) * (33 / 128)
    rows[~held_rows], weights[~held] = torch.nan, torch.nan
    out = twice(emulator.grouped_gemv, rows, b, ids, row_weights=weights, is_second=True,
                **arguments, **machine)  # fmt: skip
    weighted = (weights.double().flatten()[:, None] * product).view(tokens, topk, -1)
    if case["in_order"]:
        weighted = weighted.to(x.dtype).double()
    assert torch.equal(out, weighted.where(held[..., None], 0.0).sum(1).to(out.dtype))


@examples(40)
@given(gemvs(), st.sampled_from(list(reference.ACTIVATIONS)),
       st.sampled_from(reference.GATE_LAYOUTS), st.booleans(), SEEDS, MACHINES)  # fmt: skip
def test_grouped_gemv_activation(
    emulator, case, activation, gate_layout, parameters_given, seed, machine
):
    random, entry = Random(seed), reference.ACTIVATIONS[activation]
    b, ids, local, held, arguments = gemv_inputs(case, random, 2 if entry.gated else 1)
    x, b = random.integers(case["tokens"], case["k"], dtype=case["dtype"]) / 4, b / 4
    arguments |= dict(activation=activation, gate_layout=gate_layout)
    if parameters_given:
        for name in entry.defaults:
            arguments[name] = random.integers(case["experts"], low=1, high=4) * 0.5
    out = twice(emulator.grouped_gemv, x, b, ids, **arguments, **machine)
    held, slots = held.flatten(), local.numel()
    # Sorted, so that grouped_gemm's reference can tell what it should be.
    order = local.flatten().argsort(stable=True)
    offsets = torch.bincount(local.flatten(), minlength=case["experts"]).cumsum(0)
    offsets = torch.cat([offsets.new_zeros(1), offsets]).int()
    for name in ("expert_offset", "out_dtype", "out_padding", "in_order"):
        del arguments[name]
    tokens = torch.arange(slots) // case["topk"]
    b = b.nan_to_num()  # the experts of slots that aren't held
    expected = torch.empty(slots, case["n"], dtype=torch.float64)
    expected[order] = gemm_reference(x, b, offsets, source_rows=tokens[order].int(),
                                     rows=slots, **arguments)  # fmt: skip
    tolerance = EPSILON[out.dtype]
    torch.testing.assert_close(out[held].double(), expected[held], rtol=tolerance, atol=tolerance)


# ---- combine ----


@examples(60)
@given(st.data(), FLOATS, OFFSETS, SEEDS, MACHINES)
def test_combine(emulator, data, dtype, kind, seed, machine):
    tokens, topk = data.draw(st.integers(0, 20)), data.draw(st.sampled_from([1, 2, 8, 10]))
    hidden, experts = data.draw(SIZES | st.just(1030)), data.draw(st.sampled_from([1, 3, 8]))
    random, rows = Random(seed), tokens * topk
    weights = random.integers(tokens, topk, dtype=data.draw(FLOATS)) * 0.25
    offsets = random.expert_offsets(experts, rows, kind)
    slots = torch.randperm(rows, generator=random.generator).int()
    padding = data.draw(st.sampled_from([0, 0, 8, 1]))
    expert_out = random.integers(rows, hidden + padding, dtype=dtype)[:, :hidden]
    slot_rows = torch.full((rows,), -1, dtype=torch.int32)
    if data.draw(st.booleans()):  # anybody's: some don't exist, some come twice
        slots = random.integers(rows, low=-rows, high=2 * rows, dtype=torch.int32)
    held = int(offsets.clamp(0, rows).max())
    for row, slot in enumerate(slots[:held].tolist()):
        if 0 <= slot < rows:
            slot_rows[slot] = row
    expert_out[held:] = torch.nan
    weights[slot_rows.view(tokens, topk) < 0] = torch.nan
    weighted = data.draw(st.booleans())
    routing = dict(sorted_slots=slots, expert_offsets=offsets)
    misaligned = data.draw(st.lists(st.sampled_from(["expert_out", "out"]), unique=True))
    out = twice(emulator.combine, expert_out, weights if weighted else None, tokens=tokens,
                topk=topk, **routing, offsets={x: dtype.itemsize for x in misaligned},
                **machine)  # fmt: skip
    picked = expert_out.double()[slot_rows.clamp(min=0).long()] if rows else expert_out.double()
    if weighted:
        picked = picked * weights.double().view(-1, 1)
    picked = torch.where(slot_rows[:, None] >= 0, picked, 0).view(tokens, topk, hidden)
    assert torch.equal(out, picked.sum(1).to(dtype))


@examples(40)
@given(st.data(), FLOATS, SEEDS, MACHINES)
def test_combine_in_the_slots_order(emulator, data, dtype, seed, machine):
    tokens, topk = data.draw(st.integers(0, 20)), data.draw(st.sampled_from([1, 2, 10, 40]))
    hidden, experts = data.draw(SIZES), data.draw(st.sampled_from([1, 3, 8]))
    random, expert_offset = Random(seed), data.draw(st.sampled_from([0, 3]))
    ids_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    ids = random.integers(tokens, topk, low=-1, high=experts, dtype=ids_dtype) + expert_offset
    held = (ids >= expert_offset) & (ids < expert_offset + experts)
    split_log2 = data.draw(st.sampled_from([0, 0, 1, 2]))
    expert_out = random.integers(tokens * topk << split_log2, hidden, dtype=dtype)
    expert_out[~held.flatten().repeat_interleave(1 << split_log2)] = torch.nan
    out = twice(emulator.combine, expert_out, None, tokens=tokens, topk=topk << split_log2,
                topk_ids=ids, experts=experts, expert_offset=expert_offset,
                split_log2=split_log2, **machine)  # fmt: skip
    rows = expert_out.double().nan_to_num(0).view(tokens, topk << split_log2, hidden)
    assert torch.equal(out, rows.sum(1).to(dtype))
