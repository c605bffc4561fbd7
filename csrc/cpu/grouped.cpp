// The grouped family on CPU: adapters of many kinds in one batch; definitions in fastft/ops/grouped.py.
//
// A decoding batch reads every adapter for a token or a few, so it is memory traffic: tasks are parts of adapters, each byte
// of which is read once. An element of S, y or a gradient is owned by one task, which adds in a fixed order, so results do
// not depend on the number of threads.
#include "grouped_parts.h"
#include "grouped_wide.h"
#include "shares.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace fastft {
namespace {

template <class Op>
void run_all(const Batch& batch, const Op& op) {
  if (batch.segments.empty()) return;
  const Plan plan = op.plan(torch::stable::get_num_threads());
  const int64_t threads = threads_for(plan.cost);
  Shares shares(plan.tasks, threads);
  parallel_for(threads, plan.cost, [&](int64_t thread) {
    Workspace space;
    shares.work(thread, [&](int64_t i) { op.run(plan.tasks[i], space); });
  });
  batch.fault.raise(batch.op);
}

// Both one after the other, segment by segment: what a segment's second tasks read, its first have written. Tasks are taken
// in order, so what one waits for is being worked on.
template <class First, class Second>
void run_both(const Batch& batch, const First& first, const Second& second) {
  if (batch.segments.empty()) return;
  const int64_t most = torch::stable::get_num_threads();
  const Plan before = first.plan(most), after = second.plan(most);
  std::vector<Open<int32_t>> open(batch.segments.size());
  for (const Task& task : before.tasks) open[task.first].add();
  const double cost = before.cost + after.cost;
  const int64_t threads = threads_for(cost);
  Shares first_shares(before.tasks, threads), second_shares(after.tasks, threads);
  parallel_for(threads, cost, [&](int64_t thread) {
    Workspace space;
    first_shares.work(thread,
                      [&](int64_t i) { open[before.tasks[i].first].run([&] { first.run(before.tasks[i], space); }); });
    second_shares.work(thread, [&](int64_t i) {
      const Task& task = after.tasks[i];
      for (int32_t d = task.first; d < task.last; ++d) open[d].wait();
      second.run(task, space);
    });
  });
  batch.fault.raise(batch.op);
}

// Calls f with null pointers of the activations' and of the store's element type.
template <class F>
void dispatch_pair(const Tensor& x, const Tensor& store, const F& f) {
  dispatch(x, [&](auto* type) { store.scalar_type() == f32 ? f(type, static_cast<float*>(nullptr)) : f(type, type); });
}

Sums<const float> in_rows(const Tensor& s) { return {static_cast<const float*>(s.const_data_ptr()), s.stride(0), 1}; }

void check_activations(const char* op, const char* name, const Tensor& t) {
  check_matrix(op, name, t);
  check_rows(op, name, t, Where::cpu, {f32, b16, h16}, {t.size(0), t.size(1)});
}

Tensor grouped_shrink(const Tensor& x, const Tensor& store, const Tensor& offsets, const Tensor& pieces,
                      const Tensor& segments, const Tensor& assignments, int64_t k, int64_t width) {
  const char* op = "grouped_shrink";
  check_activations(op, "x", x);
  STD_TORCH_CHECK(width >= 0, op, ": width is ", width, ", must not be negative");
  check(op, "store", store, Where::cpu, {x.scalar_type(), f32}, {store.numel()});
  Batch batch(op, store, offsets, pieces, segments, assignments, nullptr, k, {x.size(0), x.size(1), -1, width});
  Tensor s = empty_on(x, {assignments.numel(), width}, f32);
  auto* sums = static_cast<float*>(s.mutable_data_ptr());
  take_wide(batch, x, store, true, false, [&](const auto& one, int64_t p, int64_t t, int64_t rows) {
    const Scratch<float> own(rows * one.sums_width());
    one.shrink(static_cast<const bf16*>(x.const_data_ptr()), x.stride(0), t, rows, own.get(), Ahead());
    for (int64_t i = 0; i < rows; ++i)
      std::copy_n(own.get() + i * one.sums_width(), one.piece.count, sums + (p + i) * width + one.piece.s_first);
  });
  dispatch_pair(x, store, [&](auto* type, auto* own) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = std::remove_pointer_t<decltype(own)>;
    run_all(batch, Shrink<T, W>{batch, data(x, type), x.stride(0), data(store, own), {sums, width, 1}});
  });
  return s;
}

void grouped_expand_(Tensor y, const Tensor& x, const Tensor& s, const Tensor& store, const Tensor& offsets,
                     const Tensor& columns, const Tensor& pieces, const Tensor& segments, const Tensor& assignments,
                     const std::optional<Tensor>& weights, int64_t k) {
  const char* op = "grouped_expand_";
  check_activations(op, "y", y);
  check_matrix(op, "x", x);
  check_matrix(op, "s", s);
  check_rows(op, "x", x, Where::cpu, {y.scalar_type()}, {y.size(0), x.size(1)});
  check_rows(op, "s", s, Where::cpu, {f32}, {assignments.numel(), s.size(1)});
  check(op, "store", store, Where::cpu, {y.scalar_type(), f32}, {store.numel()});
  check(op, "columns", columns, Where::cpu, {ScalarType::Short}, {columns.numel()});
  Batch batch(op, store, offsets, pieces, segments, assignments, weights ? &*weights : nullptr, k,
              {y.size(0), x.size(1), y.size(1), s.size(1)});
  const Sums<const float> sums = in_rows(s);
  take_wide(batch, y, store, false, true, [&](const auto& one, int64_t p, int64_t t, int64_t rows) {
    auto* to = static_cast<bf16*>(y.mutable_data_ptr());
    one.expand({&sums.at(p, one.piece.s_first), sums.row, one.piece.count}, to, y.stride(0), t, rows);
  });
  dispatch_pair(y, store, [&](auto* type, auto* own) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = std::remove_pointer_t<decltype(own)>;
    run_all(batch, Expand<T, W>{batch, mutable_data(y, type), y.stride(0), data(x, type), x.stride(0), sums,
                                data(store, own), static_cast<const uint16_t*>(columns.const_data_ptr()), columns.numel()});
  });
}

// Both in one: what a call costs its caller is paid once, and S stays here. x and y may have leading dimensions, or their
// caller would pay for views.
void grouped_add_(Tensor y, const Tensor& x, const Tensor& store, const Tensor& offsets, const Tensor& columns,
                  const Tensor& pieces, const Tensor& segments, const Tensor& assignments,
                  const std::optional<Tensor>& weights, int64_t k, int64_t width) {
  const char* op = "grouped_add_";
  const Rows to = checked_rows(op, "y", y, Where::cpu, {f32, b16, h16});
  const Rows from = checked_rows(op, "x", x, Where::cpu, {y.scalar_type()});
  STD_TORCH_CHECK(to.count == from.count, op, ": y has ", to.count, " rows, x ", from.count);
  STD_TORCH_CHECK(width >= 0, op, ": width is ", width, ", must not be negative");
  check(op, "store", store, Where::cpu, {y.scalar_type(), f32}, {store.numel()});
  check(op, "columns", columns, Where::cpu, {ScalarType::Short}, {columns.numel()});
  Batch batch(op, store, offsets, pieces, segments, assignments, weights ? &*weights : nullptr, k,
              {to.count, from.width, to.width, width});
  take_wide(batch, y, store, true, true, [&](const auto& one, int64_t, int64_t t, int64_t rows) {
    one.add(static_cast<const bf16*>(x.const_data_ptr()), from.stride, static_cast<bf16*>(y.mutable_data_ptr()), to.stride,
            t, rows);
  });
  if (batch.segments.empty()) return;
  const int64_t column = round_up(assignments.numel(), 16);  // whole cache lines
  const Scratch<float> s(column * width);
  dispatch_pair(y, store, [&](auto* type, auto* own) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = std::remove_pointer_t<decltype(own)>;
    run_both(batch, Shrink<T, W>{batch, data(x, type), from.stride, data(store, own), {s.get(), 1, column}},
             Expand<T, W>{batch, mutable_data(y, type), to.stride, data(x, type), from.stride,
                          Sums<const float>{s.get(), 1, column}, data(store, own),
                          static_cast<const uint16_t*>(columns.const_data_ptr()), columns.numel()});
  });
}

void grouped_outer_(Tensor grad, const Tensor& values, const Tensor& other, const Tensor& s, const Tensor& offsets,
                    const Tensor& pieces, const Tensor& segments, const Tensor& assignments,
                    const std::optional<Tensor>& weights, int64_t k) {
  const char* op = "grouped_outer_";
  check_activations(op, "values", values);
  check_matrix(op, "other", other);
  check_matrix(op, "s", s);
  check_rows(op, "other", other, Where::cpu, {values.scalar_type()}, {values.size(0), other.size(1)});
  check_rows(op, "s", s, Where::cpu, {f32}, {assignments.numel(), s.size(1)});
  check(op, "grad", grad, Where::cpu, {values.scalar_type(), f32}, {grad.numel()});
  const Batch batch(op, grad, offsets, pieces, segments, assignments, weights ? &*weights : nullptr, k,
                    {values.size(0), values.size(1), other.size(1), s.size(1)});
  dispatch_pair(values, grad, [&](auto* type, auto* own) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = std::remove_pointer_t<decltype(own)>;
    run_all(batch, Outer<T, W>{batch, mutable_data(grad, own), data(values, type), values.stride(0), data(other, type),
                               other.stride(0), in_rows(s)});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, CPU, m) {
  m.impl("grouped_shrink", TORCH_BOX(&grouped_shrink));
  m.impl("grouped_expand_", TORCH_BOX(&grouped_expand_));
  m.impl("grouped_add_", TORCH_BOX(&grouped_add_));
  m.impl("grouped_outer_", TORCH_BOX(&grouped_outer_));
}

}  // namespace fastft
