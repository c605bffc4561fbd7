// Flat arrays that belong together (base, delta, moments of what trains), a pack of n elements a thread: 16 bytes of the
// widest ones.
#pragma once

#include "operands.cuh"

namespace fastft {

template <class T, int n>
struct alignas(n * sizeof(T)) Pack {
  T v[n];
  using Word = std::conditional_t<sizeof(T) * n == 16, uint4, uint64_t>;
};

// A pack at an index of an array of `size` elements: in one access where kWhole says that it lies within and is aligned,
// else element by element, those past the end 0. `kOnce`: nothing writes the array during the kernel.
template <bool kOnce, bool kWhole, int n, class T>
__device__ __forceinline__ Pack<T, n> load_pack(const T* array, int64_t at, int64_t size) {
  using Word = typename Pack<T, n>::Word;
  Pack<T, n> pack{};
  if constexpr (kWhole) {
    note_load(array, sizeof(pack));
    const Word* source = reinterpret_cast<const Word*>(array + at);
    if constexpr (kOnce && sizeof(Word) == 16)
      *reinterpret_cast<Word*>(&pack) = ptx::load_once(source);
    else
      *reinterpret_cast<Word*>(&pack) = *source;
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j)
      if (at + j < size) pack.v[j] = get(array, at + j);
  }
  return pack;
}

template <bool kWhole, int n, class T>
__device__ __forceinline__ void store_pack(T* array, int64_t at, int64_t size, const Pack<T, n>& pack) {
  using Word = typename Pack<T, n>::Word;
  if constexpr (kWhole) {
    note_store(array, sizeof(pack));
    *reinterpret_cast<Word*>(array + at) = *reinterpret_cast<const Word*>(&pack);
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j)
      if (at + j < size) put(array, at + j, pack.v[j]);
  }
}

template <int n>
dim3 pack_grid(int64_t size) {
  return dim3(unsigned(ceil_div(size, int64_t(n) * kThreads)));
}

// Calls f(first element, whole) for this thread's pack of n of `size` elements. `whole` is a constant, so that the loads of
// all arrays stand in one block of code and are in flight together. `vectors`: all arrays start on a 16-byte boundary.
template <int n, class F>
__device__ __forceinline__ void for_pack(bool vectors, int64_t size, F&& f) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * n;
  if (vectors && at + n <= size)
    f(at, std::true_type{});
  else if (at < size)
    f(at, std::false_type{});
}

inline bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

}  // namespace fastft
