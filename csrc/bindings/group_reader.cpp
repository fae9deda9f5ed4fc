#include "group_reader.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <map>
#include <string_view>
#include <utility>

#include "devices.h"

namespace recap {
namespace {

constexpr const char* kSparseAdam = "sparse_adam";

// Whatever the algorithm.
enum FormatOption {
  kStateDtype,
  kMasterWeights,
  kStochasticRounding,
  kRoundingSeed,
  kFormatOptions
};
constexpr std::string_view kFormatKeys[kFormatOptions] = {"state_dtype", "master_weights",
                                                          "stochastic_rounding", "rounding_seed"};

Algorithm algorithm_named(const std::string& name) {
  if (name == kSparseAdam) return Algorithm::adam;
#define RECAP_IF_NAMED(candidate, ...) \
  if (name == #candidate) return Algorithm::candidate;
  RECAP_ALGORITHMS(RECAP_IF_NAMED)
#undef RECAP_IF_NAMED
  throw py::value_error("unknown algorithm '" + name + "'");
}

// Of torch.optim.SparseAdam's group, all that it has of Adam's.
bool is_of_sparse_adam(const Option& option) {
  return option.key == std::string_view("betas") || option.key == std::string_view("eps");
}

// Whether the number or pair of numbers can change without becoming another object, as those in a
// tensor, a list or an array can.
bool can_change_in_place(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      if (can_change_in_place(PyTuple_GET_ITEM(value, i))) return true;
    }
    return false;
  }
  return !(PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
           value == Py_None || PyUnicode_CheckExact(value));
}

}  // namespace

GroupReader::GroupReader(const std::string& algorithm, py::dict group, std::string name,
                         bool clears_grads, bool device_values)
    : group_(std::move(group)), device_values_(device_values), name_(std::move(name)) {
  hyper_.algorithm = algorithm_named(algorithm);
  hyper_.sparse_only = algorithm == kSparseAdam;
  hyper_.clears_grads = clears_grads;
  hyper_.visit([](auto, auto& options) { options = {}; });
  for (auto entry : group_) {
    items_.push_back({py::reinterpret_borrow<py::object>(entry.first),
                      py::reinterpret_borrow<py::object>(entry.second)});
    meanings_.push_back(meaning(entry.first, entry.second));
    any_in_place_ |= meanings_.back().in_place;
    read(meanings_.back(), entry.second);
  }
  const auto require = [this](const char* key) {
    if (group_.contains(key)) return;
    throw py::key_error(name_ + " has no '" + key + "'; add it to the param group");
  };
  require("lr");
  hyper_.visit([&](auto traits, const auto&) {
    for (const Option& option : traits.kOptions) {
      if (option.required && option_named(option.key)) require(option.key);
    }
  });
  shape_then_ = hyper_.shape();
  formats_then_ = formats_;
  was_capturable_ = capturable_;
  in_memory_ = DictItems(group_.ptr());
}

GroupReader::Meaning GroupReader::meaning(py::handle key, py::handle value) const {
  static const std::map<std::string, Field> common = {
      {"params", Field::params},
      {"lr", Field::lr},
      {"maximize", Field::maximize},
      {"capturable", Field::capturable},
      {"differentiable", Field::differentiable},
  };
  Field field = Field::none;
  uint8_t number = 0;
  if (py::isinstance<py::str>(key)) {
    const char* const text = PyUnicode_AsUTF8(key.ptr());
    if (!text) PyErr_Clear();  // of no meaning here, but the user's
    const std::string name = text ? text : "";
    const auto found = common.find(name);
    if (found != common.end()) {
      field = found->second;
    } else if (const Option* named = option_named(name)) {
      field = Field::option;
      number = static_cast<uint8_t>(named - options());
    } else if (const auto* key = std::find(std::begin(kFormatKeys), std::end(kFormatKeys), name);
               key != std::end(kFormatKeys)) {
      field = Field::format;
      number = static_cast<uint8_t>(key - kFormatKeys);
    }
  }
  return {field, number, is_hyperparameter(field) && can_change_in_place(value.ptr())};
}

const Option* GroupReader::option_named(const std::string& key) const {
  return hyper_.visit([&](auto traits, const auto&) -> const Option* {
    for (const Option& option : traits.kOptions) {
      if (option.key == key) {
        return hyper_.sparse_only && !is_of_sparse_adam(option) ? nullptr : &option;
      }
    }
    return nullptr;
  });
}

const Option* GroupReader::options() const {
  return hyper_.visit([](auto traits, const auto&) -> const Option* { return traits.kOptions; });
}

double GroupReader::number(py::handle value, const char* key) const {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (THPVariable_Check(value.ptr())) {
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    if (tensor.numel() == 1 && !tensor.is_complex()) return tensor.item().toDouble();
    throw py::value_error(name_ + ": '" + key + "' is a tensor of " +
                          std::to_string(tensor.numel()) + " elements; it must have one");
  }
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    throw py::type_error(name_ + ": '" + key + "' must be a number, not " +
                         std::string(py::str(py::type::of(value))));
  }
  return number;
}

// In the range of torch's constructors: beyond it, bias corrections divide by zero or worse.
double GroupReader::decay_rate(py::handle value, const std::string& key) const {
  const double rate = number(value, key.c_str());
  if (rate >= 0.0 && rate < 1.0) return rate;
  throw py::value_error(name_ + ": '" + key + "' is " + std::string(py::str(py::float_(rate))) +
                        "; it must be at least 0 and less than 1");
}

bool GroupReader::flag(py::handle value, const char* key) const {
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) {
    PyErr_Clear();
    throw py::type_error(name_ + ": '" + key + "' must be True or False");
  }
  return truth != 0;
}

void GroupReader::read_lr(py::handle value, const char* key) {
  at::Tensor on_device;
  if (device_values_ && THPVariable_Check(value.ptr())) {
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    if (engine_for(tensor.device()) == EngineKind::cuda) on_device = tensor;
  }
  double lr = std::numeric_limits<double>::quiet_NaN();
  if (!on_device.defined()) {
    lr = number(value, key);
  } else if (on_device.numel() != 1 ||
             (on_device.scalar_type() != at::kFloat && on_device.scalar_type() != at::kDouble)) {
    throw py::value_error(name_ + ": '" + key +
                          "' must be one float32 or float64 number to be read on its device");
  }
  device_lr_ = std::move(on_device);
  hyper_.lr = lr;
}

void GroupReader::read_option(const Option& option, py::handle value) {
  char* const place = reinterpret_cast<char*>(&hyper_.adam) + option.offset;
  auto* const numbers = reinterpret_cast<double*>(place);
  const std::string key = option.key;
  switch (option.kind) {
    case OptionKind::number: numbers[0] = number(value, option.key); break;
    case OptionKind::decay_rate: numbers[0] = decay_rate(value, key); break;
    case OptionKind::flag: *reinterpret_cast<bool*>(place) = flag(value, option.key); break;
    case OptionKind::decay_rates: {
      if (!PySequence_Check(value.ptr()) || PySequence_Size(value.ptr()) != 2) {
        throw py::type_error(name_ + ": '" + key + "' must be a pair of numbers");
      }
      const auto rates = py::reinterpret_borrow<py::sequence>(value);
      const double first = decay_rate(py::object(rates[0]), key + "[0]");
      numbers[1] = decay_rate(py::object(rates[1]), key + "[1]");
      numbers[0] = first;
      break;
    }
  }
}

void GroupReader::read_format(int option, py::handle value) {
  formats_.are_given = true;
  switch (option) {
    case kMasterWeights: formats_.master_weights = flag(value, "master_weights"); return;
    case kStochasticRounding:
      formats_.stochastic_rounding = flag(value, "stochastic_rounding");
      return;
    case kRoundingSeed: {
      const int64_t seed = PyLong_AsLongLong(value.ptr());
      if (seed == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        throw py::type_error(name_ + ": 'rounding_seed' must be a whole number of 64 bits");
      }
      formats_.seed = seed;
      return;
    }
    default: break;
  }
  formats_.state = std::nullopt;
  formats_.eight_bits =
      PyUnicode_Check(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), "8bit") == 0;
  if (value.is_none() || formats_.eight_bits) return;
  if (THPDtype_Check(value.ptr())) {
    formats_.state = dtype_of(reinterpret_cast<THPDtype*>(value.ptr())->scalar_type);
  }
  if (!formats_.state) {
    throw py::value_error(
        name_ + ": 'state_dtype' is " + std::string(py::repr(value)) +
        "; it must be None, torch.float32, torch.bfloat16, torch.float16 or '8bit'");
  }
}

void GroupReader::read(Meaning meaning, py::handle value) {
  switch (meaning.field) {
    case Field::none:
    case Field::params: break;
    case Field::lr: read_lr(value, "lr"); break;
    case Field::format: read_format(meaning.option, value); break;
    case Field::option: read_option(options()[meaning.option], value); break;
    case Field::maximize: hyper_.maximize = flag(value, "maximize"); break;
    case Field::capturable: capturable_ = flag(value, "capturable"); break;
    case Field::differentiable:
      if (flag(value, "differentiable")) {
        throw py::value_error(
            name_ +
            ": differentiable=True is not supported by the fused step; use the torch.optim class");
      }
      break;
  }
}

bool GroupReader::refresh() {
  PyObject* group = group_.ptr();
  if (version_.is_of(group)) return fits_;
  const DictVersion version(group);
  if (static_cast<size_t>(PyDict_GET_SIZE(group)) != items_.size()) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  bool any_in_place = false;  // of those read up to here
  const DictItems::Item* const in_memory = in_memory_.of(group);
  for (size_t i = 0; i < items_.size(); ++i) {
    Item& item = items_[i];
    if (!in_memory) {
      if (!PyDict_Next(group, &position, &key, &value)) return false;
    } else {
      key = in_memory[i].key;
      value = in_memory[i].value;
    }
    if (key != item.key.ptr()) return false;
    if (meanings_[i].field == Field::lr && PyFloat_CheckExact(value)) {
      take_lr(PyFloat_AS_DOUBLE(value), i);
      continue;
    }
    if (value == item.value.ptr() && !(any_in_place_ && meanings_[i].in_place)) continue;
    Meaning now = meanings_[i];
    if (now.field == Field::params) return false;
    now.in_place = is_hyperparameter(now.field) && can_change_in_place(value);
    auto kept = py::reinterpret_borrow<py::object>(value);
    read(now, kept);  // may raise: only what was read becomes known
    if (in_memory && in_memory_.of(group) != in_memory) return false;  // it has run Python
    any_in_place |= now.in_place;
    any_in_place_ |= now.in_place;
    meanings_[i] = now;
    item.value = std::move(kept);
  }
  any_in_place_ = any_in_place;
  // With the version of before: reading a value may have run Python. What may change in place is
  // read at every step.
  if (!any_in_place_) version_ = version;
  if (!in_memory && !in_memory_.knows(group)) in_memory_ = DictItems(group);
  fits_ = fits_plan();
  return fits_;
}

void GroupReader::take_lr(double lr, size_t item) {
  hyper_.lr = lr;
  if (!items_[item].value) return;
  meanings_[item].in_place = false;
  device_lr_ = at::Tensor();
  items_[item].value = {};
}

// Against what the plan was made with: an earlier call may have read a switch and then raised.
bool GroupReader::fits_plan() const {
  return shape_then_ == hyper_.shape() && was_capturable_ == capturable_ &&
         formats_then_ == formats_;
}

}  // namespace recap
