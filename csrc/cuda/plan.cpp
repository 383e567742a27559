// shapes.h's choices: the row tiles' on the current device, and all for people to ask without a GPU
// (benchmarks/picks.py).
#include <sstream>
#include <string>

#include "primitives.h"
#include "shapes.h"

namespace simple_moe::cuda {
namespace {

void describe(std::ostream& text, const RowTiles& tiles, const ProductSize& size,
              const DeviceInfo& device) {
  const GemmTile& tile = kShapes[choose_shape(tiles, size, device)];
  text << "{\"rows\": " << tile.rows << ", \"cols\": " << tile.cols << ", \"depth\": " << tile.depth
       << ", \"stages\": " << tile.stages << ", \"warps\": " << tile.warps()
       << ", \"blocks_per_sm\": " << resident_blocks(tile, device)
       << ", \"most_items\": " << tiles.most * column_tiles(size.n, size.gated, tile.cols) << "}";
}

}  // namespace

RowTiles plan_row_tiles(int64_t rows, int64_t experts, int64_t columns) {
  return plan_row_tiles(rows, experts, columns, device_info());
}

}  // namespace simple_moe::cuda

// Of a layer by mma.sync on a GPU of so many multiprocessors and so much shared memory a block: a
// JSON list of its first product's tile and its second's. Valid until the next call of the thread.
extern "C" __attribute__((visibility("default"))) const char* simple_moe_plan(
    int64_t slots, int64_t experts, int64_t hidden, int64_t intermediate, int gated, int sms,
    int smem_kb) {
  using namespace simple_moe;
  using namespace simple_moe::cuda;
  const size_t smem = static_cast<size_t>(smem_kb) << 10;
  const DeviceInfo device{.sm_count = sms,
                          .smem_per_block = smem,
                          .smem_per_sm = smem + 1024,
                          .major = 8,
                          .minor = 0,
                          .early_launch = false};
  const int64_t columns = hidden < intermediate ? hidden : intermediate;
  const RowTiles tiles = plan_row_tiles(slots, experts, columns, device);
  std::ostringstream text;
  text << "[";
  describe(text, tiles, {slots, experts, intermediate, hidden, gated != 0}, device);
  text << ", ";
  describe(text, tiles, {slots, experts, hidden, intermediate, false}, device);
  text << "]";
  static thread_local std::string answer;
  answer = text.str();
  return answer.c_str();
}
