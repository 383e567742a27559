// Which output tiles a block works on: row tiles of the experts, from the device, times the
// columns.
#pragma once

#include "params.h"
#include "ptx.cuh"
#include "shapes.h"

namespace simple_moe::cuda {

// One output tile. The one past the last has no rows.
struct alignas(16) Item {
  int expert, row_begin;
  int16_t row_count, part;  // part: of k, where it is split
  int column_tile;
};

// The items by their number: in sweeps over the columns of a group of row tiles, so that whatever
// neighbouring items share, rows or columns, is in L2.
class Items {
 public:
  // Where only `a` is new this comes before the kernel waits: the row tiles' writer was waited for
  // by the kernel before, which nothing here has read them ahead of.
  __device__ Items(const GroupedGemm& p, const Divisor& column_tiles)
      : p_(p), column_tiles_(column_tiles), count_(p.row_tiles.head->count * column_tiles.value) {}

  __device__ bool has(unsigned number) const { return number < count_; }

  // What there is in memory of an item, as it lies there: its RowTile. Nothing is made of it before
  // find(), so that nobody waits for it until then.
  __device__ uint4 look(unsigned number) const {
    if (!has(number)) return {};
    return reinterpret_cast<const uint4*>(p_.row_tiles.data())[column_tiles_.divide(number)];
  }
  __device__ Item find(unsigned number, const uint4& looked) const {
    if (!has(number)) return {};
    const unsigned column_tile = number - column_tiles_.divide(number) * column_tiles_.value;
    const auto [expert, begin, rows, listed, tiles, units, longer] =
        reinterpret_cast<const RowTile&>(looked);
    const unsigned in_group = listed * column_tiles_.value + column_tile;
    // Most groups are of one tile where tokens are few: nothing waits for a division then.
    const unsigned column = tiles > 1 ? in_group / tiles : in_group;
    const int place = static_cast<int>(in_group - column * tiles);
    const int before = (place * units + min(place, longer)) << p_.row_tiles.unit_log2;
    const int height = (units + (place < longer)) << p_.row_tiles.unit_log2;
    return {expert, begin + before, static_cast<int16_t>(min(rows - before, height)),
            static_cast<int16_t>(column & ((1u << p_.split_log2) - 1)),
            static_cast<int>(column >> p_.split_log2)};
  }

 private:
  const GroupedGemm& p_;
  const Divisor& column_tiles_;
  unsigned count_;
};

// A tile of so many lines is written, and all threads have met since: what a layer's second product
// waits for, if this is the first.
__device__ __forceinline__ void publish(const GroupedGemm& p, const Item& item, int lines) {
  if (threadIdx.x != 0 || p.is_second || !p.row_tiles.progress) return;
  ptx::add_release(p.row_tiles.progress + item.row_begin,
                   is_gated(p.activation.kind) ? lines / 2 : lines);
}

// A block's items for a kernel that copies ahead of its products: a queue in shared memory, filled
// by thread 0. The first fall to every block alike; after that a block claims its next. So the
// items in the making stay neighbours, and share what they read from L2, however long the blocks
// have run; and all end together. (With fixed shares slower blocks fell behind by whole tiles, and
// weights were read from memory three times over.)
//
// An item takes two trips to memory: it is claimed, and looked up. What comes back isn't touched
// before one of the next steps: a use is a wait. Short items are claimed early: each trip is made
// while one is copied, and the third from there is the one that was claimed. Long ones late, in the
// last steps of the item before: in the time of three of them blocks drift apart by more bytes than
// L2 holds, and neighbours share no more. (DeepSeek-V3's first product of 16384 tokens, which needs
// 16 GB, read 40 from memory so, and reads 19.)
template <int kSlots, bool kMayClaimLate>
class ItemQueue {
 public:
  // All threads. queue[0] is there after the block's next barrier. `claim_from`: choose_claim's.
  __device__ ItemQueue(const GroupedGemm& p, const Divisor& column_tiles, const int& claim_from,
                       Item* queue)
      : claim_from(claim_from),
        p_(p),
        items_(p, column_tiles),
        queue_(queue),
        next_(late() ? blockIdx.x : blockIdx.x + gridDim.x),
        claimed_(blockIdx.x + (2 - given()) * gridDim.x) {
    if (threadIdx.x != 0) return;
    const uint4 first = items_.look(blockIdx.x);
    looked_ = items_.look(next_);
    queue_[0] = items_.find(blockIdx.x, first);
  }

  // The item with that number of the block. At most kSlots are kept.
  __device__ const Item& operator[](unsigned number) const { return queue_[number % kSlots]; }

  // Item `number` will be begun in so many steps. What is found then is there after the block's
  // next barrier: that item, or, if they are claimed early and it is being begun, the one after it.
  __device__ void prepare(unsigned number, int steps_left) {
    // A branch of its own: else the compiler adds for whichever lanes there are, and waits.
    if (threadIdx.x != 0) return;
    const auto due = [&](int at) { return steps_left == (late() ? at : 0); };
    if (due(kFindAt)) queue_[(number + !late()) % kSlots] = items_.find(next_, looked_);
    if (due(kLookAt)) next_ = claimed_ + given() * gridDim.x;
    // In this order: the other way round the compiler moves what was looked up to other registers,
    // as it does if nothing is asked before a claim. Past the last item there is nothing to claim.
    if (due(kClaimAt) && items_.has(next_))
      claimed_ = atomicAdd(&p_.row_tiles.head->claimed[p_.is_second], 1u);
    if (due(kLookAt)) looked_ = items_.look(next_);
  }

  const int& claim_from;  // From there on prepare() is called at each step's end.

 private:
  __device__ bool late() const { return kMayClaimLate && claim_from < static_cast<int>(p_.k); }
  // Items that fall to every block; the first claimed is its next.
  __device__ unsigned given() const { return late() ? 1 : 3; }

  const GroupedGemm& p_;
  Items items_;
  Item* queue_;
  unsigned next_;     // after the one in the queue
  unsigned claimed_;  // after that, but for those given
  uint4 looked_{};    // of next_
};

}  // namespace simple_moe::cuda
