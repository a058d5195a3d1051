// A thread's own copies into shared memory, which arrive when it waits for them: who does not wait
// finds them missing.
#pragma once

#include <cuda_runtime.h>

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  cuda_on_host::copy_async(to, from, bytes);
}
inline void __pipeline_commit() { cuda_on_host::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups) { cuda_on_host::wait_for_copies(groups); }
