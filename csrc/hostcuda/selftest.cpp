// Kernels that prove the emulator and the sanitizer: right ones and deliberately broken ones, as ops of the namespace
// fastft_hostcuda for tests/cuda/test_emulator.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../cuda/mma.cuh"

namespace fastft {
namespace {

using torch::stable::Tensor;

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// out = in, reversed through shared memory; wrong in some order of threads when the barrier is left out.
__global__ void reverse_kernel(const float* in, float* out, bool barrier) {
  SharedMemory shared;
  float* tile = shared.take<float>(blockDim.x);
  tile[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

Tensor reverse(const Tensor& in, bool barrier) {
  Tensor out = torch::stable::empty_like(in);
  unsigned threads = unsigned(in.numel());
  launch(reverse_kernel, dim3(1), dim3(threads), SharedMemory::bytes<float>(int(threads)), Stream{}, floats(in), floats(out),
         barrier);
  return out;
}

// Row 0: shfl from lane 5 of each half warp; 1: xor 3; 2: down 2 (width 8); 3: up 1; 4: ballot of odd values; 5: any, all.
__global__ void warp_kernel(const float* in, float* out) {
  const unsigned all = 0xffffffffu;
  float mine = in[threadIdx.x];
  float* row = out + threadIdx.x;
  const unsigned n = blockDim.x;
  row[0] = __shfl_sync(all, mine, 5, 16);
  row[n] = __shfl_xor_sync(all, mine, 3);
  row[2 * n] = __shfl_down_sync(all, mine, 2, 8);
  row[3 * n] = __shfl_up_sync(all, mine, 1);
  row[4 * n] = __ballot_sync(all, int(mine) % 2) == 0xaaaaaaaau;
  row[5 * n] = 2 * __any_sync(all, threadIdx.x == 7) + __all_sync(all, 1);
  __syncwarp();
}

Tensor warp(const Tensor& in) {
  Tensor out = torch::stable::new_empty(in, {6, in.numel()});
  launch(warp_kernel, dim3(1), dim3(unsigned(in.numel())), 0, Stream{}, floats(in), floats(out));
  return out;
}

// out = a b for 16 x 16 matrices, read from shared memory as they are or as their transposes.
template <class T, bool kTransposedA, bool kTransposedB>
__global__ void mma_kernel(const T* a, const T* b, float* out) {
  constexpr int pitch = 24;
  SharedMemory shared;
  T* tile_a = shared.take<T>(16 * pitch);
  T* tile_b = shared.take<T>(16 * pitch);
  const int lane = threadIdx.x % 32;
  for (int i = lane; i < 256; i += 32) {
    tile_a[i / 16 * pitch + i % 16] = a[kTransposedA ? i % 16 * 16 + i / 16 : i];
    tile_b[i / 16 * pitch + i % 16] = b[kTransposedB ? i % 16 * 16 + i / 16 : i];
  }
  __syncthreads();
  uint32_t left[4], right[4];
  load_block<kTransposedA, kTransposedA>(left, tile_a, pitch);
  load_block<!kTransposedB, kTransposedB>(right, tile_b, pitch);
  for (int n = 0; n < 2; ++n) {
    float c[4] = {};
    mma<T>(c, left, right[2 * n], right[2 * n + 1]);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 16 + 8 * n + lane % 4 * 2 + i % 2] = c[i];
  }
}

template <class T>
void launch_mma(const Tensor& a, const Tensor& b, bool transposed_a, bool transposed_b, const Tensor& out) {
  auto* kernel = transposed_a   ? transposed_b ? mma_kernel<T, true, true> : mma_kernel<T, true, false>
                 : transposed_b ? mma_kernel<T, false, true>
                                : mma_kernel<T, false, false>;
  launch(kernel, dim3(1), dim3(64), 2 * SharedMemory::bytes<T>(16 * 24), Stream{}, static_cast<const T*>(a.const_data_ptr()),
         static_cast<const T*>(b.const_data_ptr()), floats(out));
}

// a [16, 16] b [16, 16], bfloat16 or float16; two warps compute the same.
Tensor mma_product(const Tensor& a, const Tensor& b, bool transposed_a, bool transposed_b) {
  Tensor out = torch::stable::new_empty(a, {16, 16}, torch::headeronly::ScalarType::Float);
  (a.scalar_type() == torch::headeronly::ScalarType::Half
       ? launch_mma<c10::Half>
       : launch_mma<c10::BFloat16>)(a, b, transposed_a, transposed_b, out);
  return out;
}

// The three bfloat16 of each float32, as float32.
__global__ void split_kernel(const float* in, float* out) {
  c10::BFloat16 parts[3];
  split(in[threadIdx.x], parts);
  for (int i = 0; i < 3; ++i) out[i * blockDim.x + threadIdx.x] = static_cast<float>(parts[i]);
}

Tensor split_parts(const Tensor& in) {
  Tensor out = torch::stable::new_empty(in, {3, in.numel()});
  launch(split_kernel, dim3(1), dim3(unsigned(in.numel())), 0, Stream{}, floats(in), floats(out));
  return out;
}

__global__ void misuse_kernel(int kind, float* data, int64_t size) {
  SharedMemory shared;
  float* first = shared.take<float>(8);
  float* second = shared.take<float>(8);
  const bool odd = threadIdx.x % 2;
  switch (kind) {
    case 0:  // half of the threads leave before the barrier
      if (odd) return;
      __syncthreads();
      return;
    case 1:  // two barriers in two branches
      if (odd)
        __syncthreads();
      else
        __syncthreads();
      return;
    case 2:  // a warp barrier that half of its lanes never reach
      if (odd) __syncwarp();
      return;
    case 3:  // a lane that its own mask leaves out
      __syncwarp(odd ? 0xffffffffu : 0x55555554u);
      return;
    case 4:  // more shared memory than the launch gave
      shared.take<float>(1);
      return;
    case 5:  // past the end of global memory
      if (threadIdx.x == 0) data[size] = 1.0f;
      return;
    case 6:  // from one shared array into the next
      if (threadIdx.x == 0) data[0] = first[8] + second[0];
      return;
    case 7: {  // past the end of an array of the thread, after a barrier
      float local[4] = {};
      __syncthreads();
      for (int i = 0; i < int(size) + 5; ++i) local[i] = data[0];
      __syncthreads();
      data[0] = local[threadIdx.x % 4];
      return;
    }
    case 9: {  // half of a warp multiplies
      float c[4] = {};
      if (!odd) mma<c10::Half>(c, {}, 0, 0);
      return;
    }
    case 10: {  // two products in two branches
      float c[4] = {};
      if (odd)
        mma<c10::Half>(c, {}, 0, 0);
      else
        mma<c10::Half>(c, {}, 0, 0);
      return;
    }
    case 11: {  // a row off its boundary
      uint32_t m[4];
      load_matrices<false>(m, first + 1);
      return;
    }
    default:  // shared memory read before it is written
      if (threadIdx.x == 0) data[0] = second[3];
  }
}

void misuse(const Tensor& data, int64_t kind) {
  launch(misuse_kernel, dim3(1), dim3(32), 2 * SharedMemory::bytes<float>(8), Stream{}, int(kind), floats(data),
         int64_t(data.numel()));
}

// Appends each block's index in the order in which blocks run: what a kernel must not depend on.
__global__ void order_kernel(float* out, int* next) {
  if (threadIdx.x == 0) out[(*next)++] = float(blockIdx.x);
}

Tensor block_order(const Tensor& like, int64_t blocks) {
  Tensor out = torch::stable::new_empty(like, {blocks});
  int next = 0;
  launch(order_kernel, dim3(unsigned(blocks)), dim3(4), 0, Stream{}, floats(out), &next);
  return out;
}

void count(bool on) {
  hostcuda::counting = on;
  hostcuda::moved.clear();
}

// {bytes loaded, bytes stored} since counting began, of one contiguous tensor or, without one, of everything.
std::vector<int64_t> counted(std::optional<Tensor> t) {
  hostcuda::Moved sum;
  for (const auto& [array, moved] : hostcuda::moved) {
    // Launches for further groups are given pointers into the masks.
    const auto* first = t ? static_cast<const char*>(t->const_data_ptr()) : nullptr;
    if (t && (array < first || array >= first + t->numel() * t->element_size())) continue;
    sum.loads += moved.loads, sum.stores += moved.stores;
  }
  return {sum.loads, sum.stores};
}

}  // namespace

STABLE_TORCH_LIBRARY(fastft_hostcuda, m) {
  m.def("count(bool on) -> ()");
  m.def("counted(Tensor? t) -> int[]");
  m.def("reverse(Tensor x, bool barrier) -> Tensor");
  m.def("warp(Tensor x) -> Tensor");
  m.def("mma(Tensor a, Tensor b, bool transposed_a, bool transposed_b) -> Tensor");
  m.def("split(Tensor x) -> Tensor");
  m.def("misuse(Tensor x, int kind) -> ()");
  m.def("block_order(Tensor like, int blocks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastft_hostcuda, CPU, m) {
  m.impl("reverse", TORCH_BOX(&reverse));
  m.impl("warp", TORCH_BOX(&warp));
  m.impl("mma", TORCH_BOX(&mma_product));
  m.impl("split", TORCH_BOX(&split_parts));
  m.impl("misuse", TORCH_BOX(&misuse));
  m.impl("block_order", TORCH_BOX(&block_order));
}

// These two may have no tensor to choose a backend by.
STABLE_TORCH_LIBRARY_IMPL(fastft_hostcuda, CompositeExplicitAutograd, m) {
  m.impl("count", TORCH_BOX(&count));
  m.impl("counted", TORCH_BOX(&counted));
}

}  // namespace fastft
