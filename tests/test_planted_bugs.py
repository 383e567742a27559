"""What the properties of test_emulator.py are worth: with a bug planted in a kernel, they fail."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import test_emulator as properties
import torch
from emulator import Bug, Emulator, EmulatorError, build

TOYS, ROUTE, SORT, COMBINE = (
    "tests/emulator/toys.cu", "csrc/cuda/topk_route.cu", "csrc/cuda/sort_by_expert.cu",
    "csrc/cuda/combine.cu",
)  # fmt: skip
MMA = "csrc/cuda/mma_tile.cuh"
GEMM, ANY = "csrc/cuda/grouped_gemm.cuh", "csrc/cuda/grouped_gemm_any.cu"
SHAPE, COPIER, WARP, SUMS, WGMMA = (
    f"csrc/cuda/{x}.cuh"
    for x in ("gemm_shape", "copier", "warp_tile", "accumulators", "wgmma_tile")
)
SCAN, TILES = "csrc/cuda/block_scan.cuh", "csrc/cuda/row_tiles.cuh"
SHAPES, GEMV, BESIDE = (
    "csrc/cuda/shapes.h", "csrc/cuda/grouped_gemv.cu", "csrc/cuda/grouped_gemm.cu",
)  # fmt: skip
ITEMS, EPILOGUE = "csrc/cuda/items.cuh", "csrc/cuda/epilogue.cuh"
MMA_F16, WGMMA_F16 = (f"csrc/cuda/grouped_gemm_{x}.cu" for x in ("f16", "sm90_f16"))


def gates_across_vectors(emulator):
    properties.test_grouped_gemm_gates_across_vectors(emulator, torch.float32, "interleaved")


def toy_gemms(emulator):
    properties.test_toy_gemm(emulator, False)
    properties.test_toy_gemm(emulator, True)


def whole_vectors(emulator):
    properties.test_grouped_gemm_of_whole_vectors(emulator)


def long_tiles(emulator):
    properties.test_grouped_gemm_claims_late(emulator, False)


# name: the file, its text, the bug in its place, the test that must fail; what is compiled with it,
# where sources_of() doesn't know.
PLANTED = {
    "cp.async not waited for": (TOYS, "cp_async_wait<1>()", "cp_async_wait<2>()", toy_gemms),
    "stage overwritten while read": (
        TOYS, "__syncthreads();  // all threads have read the stage", "", toy_gemms),
    "stage read before all copied": (
        TOYS, "__syncthreads();  // all threads' copies have landed", "", toy_gemms),
    "rows past the end copied": (TOYS, "row0 + row < m;", "true;", toy_gemms),
    "matrices in another order": (
        TOYS, "stage.b[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]",
        "stage.b[lane / 8 % 2 * 8 + lane % 8][lane / 16 * 8]", toy_gemms),
    "scan without its barrier": (
        SCAN, "__syncthreads();\n  const T upto", "const T upto", properties.test_toy_scan),
    "scan over its last readers": (
        SCAN, "__syncthreads();  // the last scan's readers are done", "",
        properties.test_sort_by_expert_many_chunks),
    "offsets not clamped": (
        TILES, "min(max(int64_t{offsets[e]}, int64_t{0}), rows)", "offsets[e]",
        properties.test_toy_tiles),
    "offsets not monotonic": (
        BESIDE, "max(begin, clamped(e + 1))", "clamped(e + 1)", properties.test_toy_tiles),
    "a division that rounds up": (
        SHAPES, "+ value - 1) / value)", "+ 2 * value) / value)", properties.test_toy_divide),
    "last row of a tile forgotten": (
        ITEMS, "min(rows - before, height)", "min(rows - before, height) - (tiles > 1)",
        properties.test_toy_tiles),
    "longer tiles before a tile forgotten": (
        ITEMS, "place * units + min(place, longer)", "place * units", properties.test_toy_tiles),
    "items skipped between given and claimed ones": (
        ITEMS, "next_ = claimed_ + given() * gridDim.x", "next_ = claimed_ + 4 * gridDim.x",
        whole_vectors),
    "items skipped before the first claimed late": (
        ITEMS, "late() ? 1 : 3", "late() ? 2 : 3", long_tiles),
    "items claimed late not looked up": (
        ITEMS, "if (due(kLookAt)) looked_", "if (due(kLookAt) && !late()) looked_", long_tiles),
    "next item read too early": (
        GEMM, "if (steps < Shape::kStages) __syncthreads();", "", whole_vectors),
    "rows of an uneven tile forgotten": (
        WARP, "(rows + row(1) - row(0) - 1) / (row(1) - row(0))", "rows / (row(1) - row(0))",
        whole_vectors),
    "product before its copies": (
        MMA, "cp_async_wait<Shape::kStages - 2>", "cp_async_wait<Shape::kStages>",
        properties.test_grouped_gemm),
    "product before the others' copies": (
        MMA, "__syncthreads();  // This slot has landed", "// This slot has landed",
        properties.test_grouped_gemm),
    "slot filled over a result that is read": (
        MMA, "__syncthreads();  // The last result is read.", "", properties.test_grouped_gemm),
    "result written over a slot that is read": (
        MMA, "__syncthreads();  // The ring is free.", "", properties.test_grouped_gemm),
    "result read before all is there": (
        MMA, "__syncthreads();  // The result is there.", "", properties.test_grouped_gemm),
    "elements that lie apart copied as neighbours": (
        MMA, "neighbours_ & ", "", gates_across_vectors, ANY),
    "16 bytes copied from anywhere": (
        MMA, "(reinterpret_cast<uintptr_t>(line) % 16 == 0)", "true",
        properties.test_grouped_gemm),
    "16 bytes copied from anywhere, with k as the slow axis": (
        MMA, " && k_stride * sizeof(T) % 16 == 0", "", properties.test_grouped_gemm),
    "slot before its copies": (
        COPIER, "cp_async_wait<Shape::kAhead - 1>", "cp_async_wait<Shape::kAhead + 1>",
        whole_vectors),
    "slot before the others' copies": (
        COPIER, "  }\n  __syncthreads();\n}", "  }\n}", whole_vectors),
    "slot filled while it is multiplied": (
        COPIER, "Shape::kBehind == 1 ? slot", "Shape::kBehind == 1 ? slot + Shape::kSlotBytes",
        whole_vectors),
    "slot filled while wgmma reads it": (
        COPIER, "wgmma_wait<Shape::kBehind - 1>", "wgmma_wait<Shape::kBehind>", whole_vectors,
        WGMMA_F16),
    "sums read before wgmma is done": (
        WGMMA, "ptx::wgmma_wait<0>();", "", whole_vectors, WGMMA_F16),
    "staged sums in a slot that is filled": (
        GEMM, "if constexpr (Shape::kWgmma) __syncthreads();", "", whole_vectors, WGMMA_F16),
    "a warpgroup's rows forgotten": (
        WGMMA, "item.row_count > first_row()", "item.row_count > first_row() + 32",
        whole_vectors, WGMMA_F16),
    "warps without rows left out": (
        GEMM, "if (!Shape::kWgmma || live > 0)", "if (live > 0)", whole_vectors),
    "rows of a later item not waited for": (
        COPIER, "if (!kFirst && steps_left == 0) wait_for_rows(item);", "",
        properties.test_grouped_gemm_second_waits),
    "rows of the first item not waited for": (
        GEMM, "copier.wait_for_rows(queue[0]);", "", properties.test_grouped_gemm_second_waits),
    "last item never counted": (
        GEMM, "  }\n  __syncthreads();  // All have written the last item.\n  if (number > 0)",
        "  }\n  if (false)", properties.test_grouped_gemm_second_waits),
    "counts cleared where tiles of one height would begin": (
        TILES, "tiles.progress[begin + before(i)]", "tiles.progress[begin + i * tiles.height]",
        properties.test_grouped_gemm_second_waits, BESIDE),
    "gates and ups counted": (
        ITEMS, "? lines / 2 : lines", "? lines : lines", properties.test_grouped_gemm_second_waits),
    "high items not taken in pieces": (
        ANY, "item.row_begin += Shape::kRows", "item.row_begin = end", properties.test_grouped_gemm),
    "gates and ups swapped": (
        SHAPE, "branch_row(p, column, line % 16 >= 8)", "branch_row(p, column, line % 16 < 8)",
        properties.test_grouped_gemm_activation),
    "k past the end copied": (
        COPIER, "const int left = static_cast<int>(p_.k) - k_ - ahead * Shape::kDepth;",
        "const int left = 1 << 20;", whole_vectors),
    "rows past the last copied": (
        COPIER, "a_passes_ = passes(item.row_count);", "a_passes_ = Shape::kPassesA;",
        whole_vectors),
    "columns past the last copied": (
        COPIER, "kWhole ? lines :", "kWhole ? lines + Shape::kPass :", whole_vectors),
    "lines past the tile copied": (
        COPIER, "min(lines, Shape::kCols)", "lines", whole_vectors, WGMMA_F16),
    "last rows not written": (
        SUMS, "lane / kVectors < row_count", "lane / kVectors < row_count - 1",
        whole_vectors),
    "rows of others written": (
        SUMS, "lane / kVectors < row_count", "lane / kVectors < row_count + 1",
        whole_vectors),
    "other rows looked up ahead": (
        SUMS, "next = target_of(p, item, i + 2)", "next = target_of(p, item, i + 1)", whole_vectors),
    "bias of gates added to ups": (
        SUMS, "staged + j * 8 + lane", "staged + (j ^ 1) * 8 + lane",
        properties.test_grouped_gemm_activation),
    "biases read too early": (
        SUMS, "__syncwarp();  // The biases are there.", "", whole_vectors),
    "staged rows read too early": (
        SUMS, "__syncwarp();  // The rows are there.", "", whole_vectors),
    "ups in the place of gates": (
        SUMS, "activate_gated<4>(kind, scalars, four.values, ups.values)",
        "activate_gated<4>(kind, scalars, ups.values, four.values)",
        properties.test_grouped_gemm_activation),
    "gates for ups too": (
        SUMS, "&ups = acc_[i][j ^ 1]", "&ups = acc_[i][j]",
        properties.test_grouped_gemm_activation),
    "logit one too far": (
        ROUTE, "e < p.experts; e += 32)\n    keys[e]", "e <= p.experts; e += 32)\n    keys[e]",
        properties.test_topk_route),
    "groups not waited for": (
        ROUTE, "}\n  __syncwarp();\n  uint64_t last_chosen", "}\n  uint64_t last_chosen",
        properties.test_topk_route),
    "NaN counted in the sum": (ROUTE, "if (term == term) sum_", "sum_", properties.test_topk_route),
    "counts not waited for": (
        SORT, "__syncthreads();  // all is counted", "", properties.test_sort_by_expert),
    "counts cleared late": (
        SORT, "__syncthreads();  // the counts are zero", "", properties.test_sort_by_expert),
    "slots of the block counted before it": (
        SORT, "(kOfLane * warp + i) < first", "(kOfLane * warp + i) <= first",
        properties.test_sort_by_expert),
    "chunks' counts not carried on": (
        SORT, "sum += p.counts[c * bins + bin]", "sum = p.counts[c * bins + bin]",
        properties.test_sort_by_expert_many_chunks),
    "place changed while read": (
        SORT, "__syncwarp();  // all have read the place", "", properties.test_sort_by_expert),
    "two blocks' chunks scattered": (
        SORT, "of_block >= plan.chunks_of_block) return", "of_block > plan.chunks_of_block) return",
        properties.test_sort_by_expert_many_chunks),
    "last offset not written": (
        SORT, "p.expert_offsets[bin] =", "if (bin < p.ids.experts) p.expert_offsets[bin] =",
        properties.test_sort_by_expert),
    "places counted from their chunk": (
        SORT, "begins[bin[i]] + places[bin[i]] + rank", "places[bin[i]] + rank",
        properties.test_sort_by_expert_many_chunks),
    "row not scattered": (
        SUMS, "there && p.out_rows ? p.out_rows[row] : row", "row", whole_vectors),
    "row not scattered, any sizes": (
        EPILOGUE, "p.out_rows ? p.out_rows[of_product]", "false ? 0", properties.test_grouped_gemm),
    "16 bytes at once anywhere, any sizes": (
        EPILOGUE, "(reinterpret_cast<uintptr_t>(p.out) + bytes) % 16 == 0", "true",
        properties.test_grouped_gemm),
    "rows of others added": (
        COMBINE, "slot >> p.split_log2) < p.ids.experts ?",
        "slot >> p.split_log2) <= p.ids.experts ?",
        properties.test_combine_in_the_slots_order),
    "slots of parts taken for whole ones": (
        COMBINE, "slot >> p.split_log2", "slot", properties.test_combine_in_the_slots_order),
    "bias in every part of k": (
        SUMS, "p.bias.data && item.part == 0", "p.bias.data", whole_vectors),
    "the first part of k in all": (
        COPIER, "item.part * static_cast<int>(p_.k) + k_", "k_", whole_vectors),
    "parts in one place": (SUMS, "item.part * p.n + first_column", "first_column", whole_vectors),
    "a part of a row waited for": (
        COPIER, "static_cast<int>(p_.k) << p_.split_log2", "static_cast<int>(p_.k)",
        properties.test_grouped_gemm_second_waits),
    "slots of others multiplied": (
        GEMV, "if (slot[i].expert < 0) continue;", "", properties.test_grouped_gemv),
    "vectors past the last": (
        GEMV, "vector < all ? table", "true ? table", properties.test_grouped_gemv),
    "table not waited for": (
        GEMV, "__syncthreads();  // the table is there", "", properties.test_grouped_gemv),
    "warps not waited for": (
        GEMV, "__syncthreads();  // the warps' sums are there", "", properties.test_grouped_gemv),
    "token of another slot": (
        GEMV, "first_slot : out_row / p.topk", "first_slot : out_row % p.topk",
        properties.test_grouped_gemv),
    "bias not weighted": (
        GEMV, "0.0f : weight * x", "0.0f : x", properties.test_grouped_gemv),
    "bias of a slot of others": (
        GEMV, "expert < 0 ? 0.0f : weight * x", "weight * x", properties.test_grouped_gemv),
    "turn before its copies": (
        GEMV, "cp_async_wait<2>()", "cp_async_wait<3>()", properties.test_grouped_gemv),
    "results not waited for": (
        GEMV, "__syncthreads();  // the slots' results are there", "",
        properties.test_grouped_gemv),
    "slots added before they are rounded": (
        GEMV, "ptx::to_float(ptx::from_float<T>(value[0]))", "value[0]",
        properties.test_grouped_gemv),
    "slots past the last looked up": (
        GEMV, "slot < p.rows ? local_expert", "true ? local_expert", properties.test_grouped_gemv),
    "row of a past its end": (
        GEMV, "vector < vectors);\n    if (row) ptx", "true);\n    if (row) ptx",
        properties.test_grouped_gemv),
    "token of another slot, in order": (
        GEMV, "slot : slot / p.topk", "slot : slot % p.topk", properties.test_grouped_gemv),
    "bias of gates added to ups, in order": (
        GEMV, "column + i, i == 1));", "column + i, false));",
        properties.test_grouped_gemv_activation),
    "bias of gates added to ups, by itself": (
        GEMV, "row >= kColumns)", "false)",
        properties.test_grouped_gemv_activation),
    "slot rows not cleared": (
        COMBINE, "cudaMemsetAsync(p.slot_rows, 0xFF,", "cudaMemsetAsync(p.slot_rows, 0,",
        properties.test_combine),
    "slots that don't exist": (
        COMBINE, "slot >= 0 && slot < p.tokens * p.topk", "slot < p.tokens * p.topk",
        properties.test_combine),
    "columns past the end": (
        COMBINE, "min(p.hidden - column, int64_t{kVector})", "p.hidden > column ? kVector : 0",
        properties.test_combine),
    "16 bytes at once anywhere": (
        COMBINE, "rows_are_aligned(p.out, p.hidden, p.out_dtype)", "true", properties.test_combine),
}  # fmt: skip


def sources_of(bug):
    """What is compiled with it: what its test runs of it, for one dtype."""
    file, _, _, test, *sources = PLANTED[bug]
    if sources:
        return sources
    if file.endswith(".cu"):
        return [file]
    if test in (properties.test_toy_scan, properties.test_toy_divide, properties.test_toy_tiles):
        return [TOYS, BESIDE]
    if test is properties.test_sort_by_expert_many_chunks:
        return [SORT]
    return [ANY] if test is properties.test_grouped_gemm else [MMA_F16]


@pytest.fixture(scope="module")
def programs(request):
    """Of the bugs that this run wants: the next are compiled while one is tested."""
    build()  # what all have in common

    def build_with(bug):
        file, old, new, *_ = PLANTED[bug]
        return build(Bug(file, old, new, sources_of(bug)))

    items = request.session.items
    bugs = [item.callspec.params["bug"] for item in items if item.function is test_planted_bug]
    with ThreadPoolExecutor(2) as pool:
        yield {bug: pool.submit(build_with, bug) for bug in bugs}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug(bug, programs):
    test = PLANTED[bug][3]
    emulator = Emulator(programs[bug].result())
    try:
        with pytest.raises((AssertionError, EmulatorError, pytest.fail.Exception)):
            test(emulator)
    finally:
        emulator.close()


def test_no_bug():
    """Such a program with nothing planted passes: what is seen above is the bugs' doing."""
    emulator = Emulator(build(Bug(TILES, "", "", [BESIDE, MMA_F16, WGMMA_F16])))
    try:
        properties.test_grouped_gemm_second_waits(emulator)
    finally:
        emulator.close()
