// Clusters as cooperative groups have them: of the blocks that runtime.cpp runs together.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  static void sync() { cuda_on_host::sync_cluster(); }
  static unsigned block_rank() { return cuda_on_host::block_rank(); }
  static unsigned num_blocks() { return cuda_on_host::cluster_blocks(); }

  // The same place in the shared memory of another block of the cluster.
  template <typename T>
  static T* map_shared_rank(T* address, int rank) {
    return reinterpret_cast<T*>(
        cuda_on_host::in_block(reinterpret_cast<unsigned char*>(address), rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
