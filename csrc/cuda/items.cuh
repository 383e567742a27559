// Which output tiles a block works on: row tiles of the experts, from the device, times the
// columns.
#pragma once

#include "params.h"
#include "ptx.cuh"
#include "shapes.h"

namespace simple_moe::cuda {

// One output tile. The one past the last has no rows; that of a slot whose expert isn't held here
// has -1, and is passed over.
struct alignas(16) Item {
  int expert, row_begin, row_count, column_tile;
};

// The items by their number: in sweeps over the columns of a group of row tiles, so that whatever
// neighbouring items share, rows or columns, is in L2.
class Items {
 public:
  // Where only `a` is new this comes before the kernel waits: the row tiles' writer was waited for
  // by the kernel before, which nothing here has read them ahead of.
  __device__ Items(const GroupedGemm& p, const Divisor& column_tiles)
      : p_(p),
        column_tiles_(column_tiles),
        count_((p.row_tiles.head ? p.row_tiles.head->count : static_cast<unsigned>(p.rows)) *
               column_tiles.value) {}

  // An item's group, from memory; the item, from that.
  __device__ RowTile look(unsigned number) const {
    if (number >= count_) return {};
    const unsigned tile = column_tiles_.divide(number);
    if (p_.row_tiles.head) return p_.row_tiles.data()[tile];
    const auto expert = static_cast<int32_t>(local_expert(p_.row_tiles.ids, tile));
    const int rows = expert < p_.experts ? 1 : -1;
    return {expert, static_cast<int32_t>(tile), rows, 0, 1};
  }
  __device__ Item find(unsigned number, const RowTile& group) const {
    if (number >= count_) return {};
    const unsigned first = column_tiles_.divide(number) - group.place;
    const unsigned in_group = number - first * column_tiles_.value;
    // Most groups are of one tile where tokens are few: nothing waits for a division then.
    unsigned place = 0, column_tile = in_group;
    if (group.tiles > 1) {
      place = in_group % group.tiles;
      column_tile = in_group / group.tiles;
    }
    const int before = static_cast<int>(place) * p_.row_tiles.height;
    const int left = group.rows - before;
    return {group.expert, group.begin + before,
            left < p_.row_tiles.height ? left : p_.row_tiles.height, static_cast<int>(column_tile)};
  }

 private:
  const GroupedGemm& p_;
  const Divisor& column_tiles_;
  unsigned count_;
};

// A block's items for a kernel that copies ahead of its products: a queue in shared memory, filled
// by thread 0. The first few fall to every block alike; after that a block claims the next item
// whenever it begins one. So the items in the making stay neighbours, and share what they read from
// L2, however long the blocks have run; and all end together. (With fixed shares slower blocks fell
// behind by whole tiles, and weights were read from memory three times over.) Of one token all fall
// to the blocks alike: there is nothing to share.
//
// An item takes two trips to memory: it is claimed, and looked up. Each is made while an earlier
// item is copied.
template <int kSlots>
class ItemQueue {
 public:
  // All threads. queue[0] is there after the block's next barrier.
  __device__ ItemQueue(const GroupedGemm& p, const Divisor& column_tiles, Item* queue)
      : p_(p), items_(p, column_tiles), queue_(queue), next_(given(1)), claimed_(given(2)) {
    if (threadIdx.x != 0) return;
    const RowTile first = items_.look(given(0));
    looked_ = items_.look(next_);
    queue_[0] = items_.find(given(0), first);
  }

  // The item with that number of the block. At most kSlots are kept.
  __device__ const Item& operator[](unsigned number) const { return queue_[number % kSlots]; }

  // Item `number` is being begun; the next is there after the block's next barrier.
  __device__ void begin(unsigned number) {
    if (threadIdx.x != 0) return;
    queue_[(number + 1) % kSlots] = items_.find(next_, looked_);
    next_ = claimed_;
    looked_ = items_.look(next_);
    RowTilesHead* const head = p_.row_tiles.head;
    claimed_ =
        head ? 3 * gridDim.x + atomicAdd(&head->claimed[p_.claimant], 1u) : claimed_ + gridDim.x;
  }

 private:
  // Items that fall to every block; the first claimed is its fourth.
  __device__ static unsigned given(unsigned number) { return blockIdx.x + number * gridDim.x; }

  const GroupedGemm& p_;
  Items items_;
  Item* queue_;
  unsigned next_, claimed_;  // after the one in the queue, and after that
  RowTile looked_{};         // of next_; not needed before the next begin()
};

}  // namespace simple_moe::cuda
