// Whether Python objects are still as they were: what a layer's fast way was found out from is compared before each call, several
// hundred dictionary entries for a whole model, which takes Python as long as a layer. Needs no torch.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace cvfast {

// Each method notes something as it is now; `holds` says whether all of it is still so. An error on the way counts as a change.
class Unchanged {
 public:
  Unchanged() = default;
  Unchanged(const Unchanged&) = delete;
  ~Unchanged() { clear(); }

  // Its class, and that its __dict__ is the same dictionary.
  void object(const pybind11::object& owner) {
    const auto dict = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(owner.ptr(), nullptr));
    if (!dict) throw pybind11::error_already_set();
    note(Kind::object, owner.ptr(), pybind11::type::handle_of(owner).ptr(), dict.ptr());
  }
  // An entry: the same object, or an equal number, text or tuple of them; or that there is none.
  void item(const pybind11::dict& owner, const pybind11::str& key) {
    note(Kind::item, owner.ptr(), key.ptr(), PyDict_GetItemWithError(owner.ptr(), key.ptr()));
  }
  // That it has no entries. Raises ValueError if it has.
  void empty(const pybind11::dict& owner) {
    if (owner.size() != 0) throw pybind11::value_error("the dictionary is not empty");
    note(Kind::empty, owner.ptr(), nullptr, nullptr);
  }
  // The objects in it, in their order.
  void values(const pybind11::dict& owner) {
    const auto list = pybind11::reinterpret_steal<pybind11::object>(PyDict_Values(owner.ptr()));
    note(Kind::values, owner.ptr(), nullptr, list.ptr());
  }
  // What getattr gives, compared as an entry is.
  void attribute(const pybind11::object& owner, const pybind11::str& name) {
    note(Kind::attribute, owner.ptr(), name.ptr(), pybind11::object(owner.attr(name)).ptr());
  }
  // That function(*args) gives `value`, compared as an entry is.
  void result(const pybind11::object& function, const pybind11::tuple& args, const pybind11::object& value) {
    note(Kind::result, function.ptr(), args.ptr(), value.ptr());
  }
  // How often a tensor was written to, where it lies, and some of the `bytes` that lie there: writes past torch's counter
  // leave the version alone.
  void tensor(const pybind11::object& owner, int64_t bytes) {
    const pybind11::object version = pybind11::type::of(owner).attr("_version"), address = pybind11::type::of(owner).attr("data_ptr");
    if (!Py_TYPE(version.ptr())->tp_descr_get) throw pybind11::value_error("no tensor");
    note(Kind::tensor, owner.ptr(), version.ptr(), address.ptr());
    State& state = facts_.back().state;
    if (!read_state(facts_.back(), state)) throw pybind11::error_already_set();
    state.bytes = bytes, state.sample = sample(state.address, bytes);
  }

  // The objects of a whole model have left the caches since the last call: they are asked for ahead.
  bool holds() {
    constexpr int64_t step = 32;
    const auto count = [this] { return static_cast<int64_t>(facts_.size()); };
    for (int64_t i = -2 * step; i < count(); ++i) {
      if (i + 2 * step < count()) __builtin_prefetch(facts_[i + 2 * step].owner);
      if (i + step >= 0 && i + step < count()) fetch(facts_[i + step]);
      if (i >= 0 && !is_so(facts_[i])) return PyErr_Clear(), false;
    }
    return true;
  }

  // Four pieces of the memory in [address, address + bytes) as one number.
  static uint64_t sample(long long address, int64_t bytes) {
    uint64_t number = 0;
    for (int i = 0; i < pieces; ++i) {
      uint64_t words[2] = {};
      std::memcpy(words, piece(address, bytes, i), static_cast<size_t>(std::min(bytes, piece_bytes)));
      for (const uint64_t word : words) number = (number ^ word) * 0x9e3779b97f4a7c15u + (number >> 29);
    }
    return number;
  }

  int traverse(visitproc visit, void* arg) const {
    for (const Fact& fact : facts_) {
      Py_VISIT(fact.owner);
      Py_VISIT(fact.key);
      Py_VISIT(fact.value);
    }
    return 0;
  }
  void clear() {
    std::vector<Fact> facts;
    facts.swap(facts_);  // before anything is freed, which may run any code
    for (const Fact& fact : facts) Py_XDECREF(fact.owner), Py_XDECREF(fact.key), Py_XDECREF(fact.value);
  }

 private:
  enum class Kind { object, item, empty, values, attribute, result, tensor };
  struct State {
    long long version, address;
    int64_t bytes;
    uint64_t sample;
  };
  struct Fact {
    Kind kind;
    PyObject *owner, *key, *value;  // owned
    union {
      State state;         // a tensor's
      uint64_t dict_state;  // a dictionary's when it was last as noted
    };
  };

  static constexpr int pieces = 4;
  static constexpr int64_t piece_bytes = 16;
  // The first, the last, and what lies evenly between them.
  static const char* piece(long long address, int64_t bytes, int i) {
    return reinterpret_cast<const char*>(address) + std::max<int64_t>(0, bytes - piece_bytes) * i / (pieces - 1);
  }
  // Of a tensor: its C++ object, to which the word behind a Python object's head leads (if not, nothing is lost), and the samples.
  static void fetch(const Fact& fact) {
    if (fact.kind != Kind::tensor) return;
    const char* const object = *reinterpret_cast<const char* const*>(fact.owner + 1);
    __builtin_prefetch(object);
    __builtin_prefetch(object + 5 * sizeof(void*));
    for (int i = 0; i < pieces && fact.state.bytes > 0; ++i)
      __builtin_prefetch(piece(fact.state.address, fact.state.bytes, i));
  }

  void note(Kind kind, PyObject* owner, PyObject* key, PyObject* value) {
    if (PyErr_Occurred()) throw pybind11::error_already_set();
    facts_.push_back({kind, Py_NewRef(owner), Py_XNewRef(key), Py_XNewRef(value), {}});
    if (kind == Kind::item || kind == Kind::values) facts_.back().dict_state = dict_state(owner);
  }

  // A number that differs after each change of a dictionary, or 0 where Python counts none.
  static uint64_t dict_state([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
    return 0;
#endif
  }

  // Looking an entry up touches three more lines of memory than the dictionary's state.
  static bool is_so(Fact& fact) {
    if (fact.kind != Kind::item && fact.kind != Kind::values) return is_so_anyhow(fact);
    const uint64_t now = dict_state(fact.owner);
    if (now != 0 && now == fact.dict_state) return true;
    if (!is_so_anyhow(fact)) return false;
    fact.dict_state = now;
    return true;
  }
  static bool is_so_anyhow(const Fact& fact) {
    switch (fact.kind) {
      case Kind::object: return is_object(fact);
      case Kind::item: return is_same(PyDict_GetItemWithError(fact.owner, fact.key), fact.value) && !PyErr_Occurred();
      case Kind::empty: return PyDict_GET_SIZE(fact.owner) == 0;
      case Kind::values: return has_values(fact.owner, fact.value);
      case Kind::attribute: {
        const auto now = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(fact.owner, fact.key));
        return now && is_same(now.ptr(), fact.value);
      }
      case Kind::result: {
        const auto now = pybind11::reinterpret_steal<pybind11::object>(PyObject_Call(fact.owner, fact.key, nullptr));
        return now && is_same(now.ptr(), fact.value);
      }
      case Kind::tensor: {
        State now;
        return read_state(fact, now) && now.version == fact.state.version && now.address == fact.state.address &&
               sample(now.address, fact.state.bytes) == fact.state.sample;
      }
    }
    return false;
  }

  static bool is_object(const Fact& fact) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(fact.owner)) != fact.key) return false;
    const auto dict = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(fact.owner, nullptr));
    return dict.ptr() == fact.value;
  }

  // Only of these types is known that comparing them runs no code of others.
  static bool is_plain(PyObject* value) {
    if (PyTuple_CheckExact(value)) {
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i)
        if (!is_plain(PyTuple_GET_ITEM(value, i))) return false;
      return true;
    }
    return PyLong_CheckExact(value) || PyFloat_CheckExact(value) || PyUnicode_CheckExact(value);
  }
  static bool is_same(PyObject* now, PyObject* before) {
    if (now == before) return true;
    return now && before && Py_TYPE(now) == Py_TYPE(before) && is_plain(now) && is_plain(before) &&
           PyObject_RichCompareBool(now, before, Py_EQ) == 1;
  }

  static bool has_values(PyObject* dict, PyObject* list) {
    if (PyDict_GET_SIZE(dict) != PyList_GET_SIZE(list)) return false;
    PyObject* value;
    for (Py_ssize_t at = 0, i = 0; PyDict_Next(dict, &at, nullptr, &value); ++i)
      if (value != PyList_GET_ITEM(list, i)) return false;
    return true;
  }

  // By the descriptors of its class: half of the time that looking them up takes.
  static bool read_state(const Fact& tensor, State& state) {
    PyObject* const owner = tensor.owner;
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(owner));
    return read_number(Py_TYPE(tensor.key)->tp_descr_get(tensor.key, owner, type), state.version) &&
           read_number(PyObject_Vectorcall(tensor.value, &owner, 1, nullptr), state.address);
  }
  static bool read_number(PyObject* given, long long& to) {
    const auto number = pybind11::reinterpret_steal<pybind11::object>(given);
    if (!number) return false;
    to = static_cast<long long>(PyLong_AsUnsignedLongLongMask(number.ptr()));
    return !PyErr_Occurred();
  }

  std::vector<Fact> facts_;
};

// As a class of Python whose cycles the collector sees: the models that it looks at refer to it.
inline void add_unchanged(pybind11::module_& m) {
  namespace py = pybind11;
  const auto collected = py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject& type = heap_type->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      if (!reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().holder_constructed()) return 0;
      return py::cast<const Unchanged&>(py::handle(self)).traverse(visit, arg);
    };
    type.tp_clear = [](PyObject* self) {
      py::cast<Unchanged&>(py::handle(self)).clear();
      return 0;
    };
  });
  py::class_<Unchanged>(m, "Unchanged", collected, "What was noted of Python objects, and whether it is still so.")
      .def(py::init<>())
      .def("object", &Unchanged::object, "Notes an object's class and which dictionary its __dict__ is.")
      .def("item", &Unchanged::item, "Notes an entry of a dictionary: by identity, numbers, texts and tuples of them by value.")
      .def("empty", &Unchanged::empty, "Notes that a dictionary is empty; ValueError if it is not.")
      .def("values", &Unchanged::values, "Notes the objects in a dictionary and their order.")
      .def("attribute", &Unchanged::attribute, "Notes what getattr gives, as `item` does.")
      .def("result", &Unchanged::result, "Notes what function(*args) gives where it holds, compared as `item` does.")
      .def("tensor", &Unchanged::tensor, py::arg("owner"), py::arg("bytes") = 0,
           "Notes a tensor's _version, its data_ptr() and a sample of so many bytes there.")
      .def_static("sample", &Unchanged::sample, "A number for a sample of so many bytes from an address on.")
      .def("holds", &Unchanged::holds, "Whether all that was noted is still so.");
}

}  // namespace cvfast
