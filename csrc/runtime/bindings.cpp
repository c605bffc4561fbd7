// fastft._runtime: the classes of this folder for Python. The only file here that knows of it.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <span>
#include <string>
#include <type_traits>

#include "adapter_table.h"
#include "batch_planner.h"
#include "cache_rows.h"
#include "paged_blob.h"
#include "pages.h"

namespace py = pybind11;
using namespace fastft::runtime;
using Unlocked = py::call_guard<py::gil_scoped_release>;

namespace {

// A contiguous buffer (a NumPy array, or torch's view as one) of bytes, int32 or int64. Nothing is copied.
template <typename T>
std::span<T> span_of(const py::buffer& buffer, const char* name) {
  constexpr size_t size = sizeof(T);
  constexpr const char* wanted = size == 1 ? "uint8" : size == 4 ? "int32" : "int64";
  const py::buffer_info info = buffer.request(!std::is_const_v<T>);
  const char letter = info.format.empty() ? ' ' : info.format.back();
  if (info.itemsize != static_cast<py::ssize_t>(size) || (size > 1 && letter != 'i' && letter != 'l' && letter != 'q'))
    throw std::invalid_argument(std::string(name) + " must be " + wanted + ", got items of format '" + info.format + "'");
  py::ssize_t dense = info.itemsize;
  for (size_t axis = info.shape.size(); axis-- > 0;) {
    if (info.shape[axis] != 1 && info.strides[axis] != dense)
      throw std::invalid_argument(std::string(name) + " must be contiguous");
    dense *= info.shape[axis];
  }
  return {static_cast<T*>(info.ptr), static_cast<size_t>(info.size)};
}

std::vector<AddressRun> runs_of(const py::buffer& buffer) {
  const auto numbers = span_of<const int64_t>(buffer, "runs");
  if (numbers.size() % 4) throw std::invalid_argument("runs are rows of four int64: first, count, stride, unit");
  std::vector<AddressRun> runs;
  for (size_t i = 0; i < numbers.size(); i += 4)
    runs.push_back({numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]});
  return runs;
}

void bind_table(py::module_& m) {
  py::native_enum<State>(m, "State", "enum.Enum")
      .value("on_disk", State::on_disk)
      .value("in_host", State::in_host)
      .value("loading", State::loading)
      .value("on_device", State::on_device)
      .value("draining", State::draining)
      .finalize();
  py::native_enum<Miss>(m, "Miss", "enum.Enum")
      .value("absent", Miss::absent)
      .value("pending", Miss::pending)
      .value("failed", Miss::failed)
      .finalize();
  py::native_enum<Failure>(m, "Failure", "enum.Enum")
      .value("none", Failure::none)
      .value("files", Failure::files)
      .value("room", Failure::room)
      .value("unloaded", Failure::unloaded)
      .value("closed", Failure::closed)
      .value("other", Failure::other)
      .finalize();
  py::native_enum<Urgency>(m, "Urgency", "enum.Enum")
      .value("prefetch", Urgency::prefetch)
      .value("load", Urgency::load)
      .value("demand", Urgency::demand)
      .finalize();
  py::native_enum<Task::Kind>(m, "TaskKind", "enum.Enum")
      .value("read", Task::Kind::read)
      .value("place", Task::Kind::place)
      .value("collect", Task::Kind::collect)
      .finalize();
  py::class_<Lease>(m, "Lease")
      .def_readonly("slot", &Lease::slot)
      .def_readonly("generation", &Lease::generation)
      .def_readonly("digest", &Lease::digest)
      .def_readonly("name", &Lease::name)
      .def("__repr__", [](const Lease& lease) {
        return "Lease(name='" + lease.name + "', slot=" + std::to_string(lease.slot) +
               ", generation=" + std::to_string(lease.generation) + ")";
      });
  py::class_<Outcome>(m, "Outcome")
      .def_readonly("failure", &Outcome::failure)
      .def_readonly("error", &Outcome::error)
      .def_readonly("generation", &Outcome::generation)
      .def_readonly("digest", &Outcome::digest);
  py::class_<Task>(m, "Task")
      .def_readonly("kind", &Task::kind)
      .def_readonly("name", &Task::name)
      .def_readonly("copy", &Task::copy)
      .def_readonly("generation", &Task::generation)
      .def_readonly("slot", &Task::slot)
      .def_readonly("pages", &Task::pages);
  py::class_<Garbage>(m, "Garbage").def_readonly("copies", &Garbage::copies).def_readonly("slots", &Garbage::slots);
  py::class_<Resident>(m, "Resident")
      .def_readonly("name", &Resident::name)
      .def_readonly("digest", &Resident::digest)
      .def_readonly("state", &Resident::state)
      .def_readonly("generation", &Resident::generation)
      .def_readonly("slot", &Resident::slot)
      .def_readonly("bytes", &Resident::bytes)
      .def_readonly("leases", &Resident::leases)
      .def_readonly("pinned", &Resident::pinned);
  py::class_<AdapterTable::Load, std::shared_ptr<AdapterTable::Load>>(m, "Ticket");

  py::class_<AdapterTable>(m, "AdapterTable")
      .def(py::init([](int32_t slots, int32_t pages, int64_t page_bytes, int64_t host_bytes, double reserve_seconds,
                       double retry_seconds) {
             return std::make_unique<AdapterTable>(
                 Limits{slots, pages, page_bytes, host_bytes, reserve_seconds, retry_seconds});
           }),
           py::kw_only(), py::arg("slots"), py::arg("pages"), py::arg("page_bytes"), py::arg("host_bytes"),
           py::arg("reserve_seconds") = 5.0, py::arg("retry_seconds") = 1.0)
      .def("acquire", &AdapterTable::acquire, py::arg("name"), py::arg("waited") = 0.0)
      .def("release", &AdapterTable::release)
      .def("holds", &AdapterTable::holds)
      // Tickets go through Python and back; pybind11 knows no pointers to const.
      .def("want", [](AdapterTable& table, const std::string& name,
                      Urgency urgency) { return std::const_pointer_cast<AdapterTable::Load>(table.want(name, urgency)); })
      .def("update", [](AdapterTable& table,
                        const std::string& name) { return std::const_pointer_cast<AdapterTable::Load>(table.update(name)); })
      .def(
          "wait",
          [](AdapterTable& table, const std::shared_ptr<AdapterTable::Load>& ticket, double seconds) {
            return table.wait(ticket, seconds);
          },
          Unlocked())
      .def("next_task", &AdapterTable::next_task, Unlocked())
      .def("read_done", &AdapterTable::read_done)
      .def("placed", &AdapterTable::placed)
      .def("failed", &AdapterTable::failed)
      .def("take_garbage", &AdapterTable::take_garbage)
      .def("reclaimed", &AdapterTable::reclaimed)
      .def("start_unload", &AdapterTable::start_unload)
      .def("finish_unload", &AdapterTable::finish_unload, Unlocked())
      .def("cancel_unload", &AdapterTable::cancel_unload)
      .def("forget", &AdapterTable::forget)
      .def("evict", &AdapterTable::evict)
      .def("pin", &AdapterTable::pin)
      .def("close", &AdapterTable::close)
      .def("state", &AdapterTable::state)
      .def("waits_for_room", &AdapterTable::waits_for_room)
      .def("error", &AdapterTable::error, py::arg("name"), py::arg("waited") = 0.0)
      .def("residents", &AdapterTable::residents)
      .def("check", &AdapterTable::check)
      .def("stats", [](const AdapterTable& table) {
        const Stats stats = table.stats();
        py::dict out;
#define FASTFT_STAT(name) out[#name] = stats.name
        FASTFT_STAT(slots), FASTFT_STAT(slots_used), FASTFT_STAT(pages), FASTFT_STAT(pages_used), FASTFT_STAT(page_bytes);
        FASTFT_STAT(host_bytes), FASTFT_STAT(host_cap), FASTFT_STAT(host_copies), FASTFT_STAT(leases), FASTFT_STAT(queued);
        FASTFT_STAT(known), FASTFT_STAT(hits), FASTFT_STAT(misses), FASTFT_STAT(host_hits), FASTFT_STAT(reads);
        FASTFT_STAT(loads), FASTFT_STAT(failures), FASTFT_STAT(evictions), FASTFT_STAT(host_evictions);
#undef FASTFT_STAT
        return out;
      });
}

}  // namespace

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "What serving many adapters needs of the host: where they are, whose turn it is, which token is whose.";
  bind_table(m);

  py::class_<PageAllocator>(m, "PageAllocator")
      .def(py::init<int32_t>(), py::arg("pages"))
      .def("allocate", &PageAllocator::allocate)
      .def("free", &PageAllocator::free)
      .def_property_readonly("capacity", &PageAllocator::capacity)
      .def_property_readonly("available", &PageAllocator::available);

  py::class_<BatchPlanner>(m, "BatchPlanner")
      .def(py::init<int32_t>(), py::arg("slots"))
      .def(
          "plan",
          [](BatchPlanner& planner, const py::buffer& token_slots, const py::buffer& assignments,
             const py::buffer& segments) {
            const auto out = span_of<int32_t>(segments, "segments");
            if (out.size() % 3) throw std::invalid_argument("segments are rows of three int32: slot, begin, end");
            const BatchPlan plan = planner.plan(span_of<const int32_t>(token_slots, "token_slots"),
                                                span_of<int32_t>(assignments, "assignments"), out);
            return std::pair(plan.distinct, plan.active);
          },
          py::arg("token_slots"), py::arg("assignments"), py::arg("segments"),
          "(distinct adapters, tokens that have one); int32 buffers are written in place, see batch_planner.h.");

  m.def(
      "cache_rows",
      [](const std::vector<std::vector<int64_t>>& blocks, const std::vector<int64_t>& lengths, int64_t page_size,
         int64_t stride, int64_t width, const py::buffer& rows, const py::buffer& mask) {
        cache_rows(blocks, lengths, page_size, stride, width, span_of<int64_t>(rows, "rows"),
                   span_of<uint8_t>(mask, "mask"));
      },
      py::arg("blocks"), py::arg("lengths"), py::arg("page_size"), py::arg("stride"), py::arg("width"), py::arg("rows"),
      py::arg("mask"), "int64 rows and a mask of bytes are written in place, see cache_rows.h.");

  m.def(
      "read_addresses",
      [](const py::buffer& blob, const py::buffer& runs, const py::buffer& out) {
        read_addresses(span_of<const int64_t>(blob, "blob"), runs_of(runs), span_of<int64_t>(out, "out"));
      },
      py::arg("blob"), py::arg("runs"), py::arg("out"));
  m.def(
      "relocate",
      [](const py::buffer& blob, const py::buffer& runs, const py::buffer& virtual_addresses,
         const std::vector<int32_t>& pages, int64_t page_bytes) {
        const auto numbers = span_of<int64_t>(blob, "blob");
        const auto where = runs_of(runs);
        const auto addresses = span_of<const int64_t>(virtual_addresses, "virtual_addresses");
        py::gil_scoped_release unlocked;
        relocate(numbers, where, addresses, PageMap(pages, page_bytes));
      },
      py::arg("blob"), py::arg("runs"), py::arg("virtual_addresses"), py::arg("pages"), py::arg("page_bytes"));
  m.def(
      "relocate_pieces",
      [](const py::buffer& pieces, const std::vector<int32_t>& pages, int64_t page_bytes) {
        relocate_pieces(span_of<int64_t>(pieces, "pieces"), PageMap(pages, page_bytes));
      },
      py::arg("pieces"), py::arg("pages"), py::arg("page_bytes"));
  m.def(
      "copy_pages",
      [](const py::buffer& pool, const py::buffer& blob, const std::vector<int32_t>& pages, int64_t page_bytes) {
        const auto to = span_of<std::byte>(pool, "pool");
        const auto from = span_of<const std::byte>(blob, "blob");
        py::gil_scoped_release unlocked;
        copy_pages(to, from, PageMap(pages, page_bytes));
      },
      py::arg("pool"), py::arg("blob"), py::arg("pages"), py::arg("page_bytes"));
}
