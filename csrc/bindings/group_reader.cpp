#include "group_reader.h"

#include <limits>
#include <map>
#include <set>
#include <utility>

#include "devices.h"

namespace recap {
namespace {

constexpr const char* kSparseAdam = "sparse_adam";

Algorithm algorithm_named(const std::string& name) {
  if (name == "adam" || name == kSparseAdam) return Algorithm::adam;
  if (name == "adagrad") return Algorithm::adagrad;
  if (name == "sgd") return Algorithm::sgd;
  if (name == "rowwise_adagrad") return Algorithm::rowwise_adagrad;
  throw py::value_error("unknown algorithm '" + name + "'");
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
                         bool device_values)
    : algorithm_(algorithm_named(algorithm)),
      group_(std::move(group)),
      name_(std::move(name)),
      device_values_(device_values) {
  hyper_.algorithm = algorithm_;
  hyper_.sparse_only = algorithm == kSparseAdam;
  switch (algorithm_) {
    case Algorithm::adam: hyper_.adam = {}; break;
    case Algorithm::adagrad: hyper_.adagrad = {}; break;
    case Algorithm::sgd: hyper_.sgd = {}; break;
    case Algorithm::rowwise_adagrad: hyper_.rowwise_adagrad = {}; break;
  }
  for (auto entry : group_) {
    const auto key = py::reinterpret_borrow<py::object>(entry.first);
    const auto value = py::reinterpret_borrow<py::object>(entry.second);
    const Field field =
        py::isinstance<py::str>(key) ? field_of(key.cast<std::string>()) : Field::none;
    items_.push_back(
        {key, value, field, is_hyperparameter(field) && can_change_in_place(value.ptr())});
    read(items_.back());
  }
  static const std::map<Algorithm, std::set<std::string>> required = {
      {Algorithm::adam,
       {"lr", "betas", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay"}},
      {Algorithm::adagrad, {"lr", "lr_decay", "eps", "weight_decay"}},
      {Algorithm::sgd, {"lr", "momentum", "dampening", "weight_decay", "nesterov"}},
      {Algorithm::rowwise_adagrad, {"lr", "eps", "weight_decay", "decoupled_weight_decay"}},
  };
  static const std::set<std::string> of_sparse_adam = {"lr", "betas", "eps"};
  for (const std::string& key : hyper_.sparse_only ? of_sparse_adam : required.at(algorithm_)) {
    if (!group_.contains(key)) {
      throw py::key_error(name_ + " has no '" + key + "'; add it to the param group");
    }
  }
  shape_then_ = shape();
  was_capturable_ = capturable_;
}

GroupReader::Field GroupReader::field_of(const std::string& key) const {
  static const std::map<std::string, Field> common = {
      {"params", Field::params},
      {"lr", Field::lr},
      {"weight_decay", Field::weight_decay},
      {"maximize", Field::maximize},
      {"capturable", Field::capturable},
      {"differentiable", Field::differentiable},
  };
  static const std::map<Algorithm, std::map<std::string, Field>> own = {
      {Algorithm::adam,
       {{"betas", Field::betas},
        {"eps", Field::eps},
        {"amsgrad", Field::amsgrad},
        {"decoupled_weight_decay", Field::decoupled_weight_decay},
        {"lazy", Field::lazy}}},
      {Algorithm::adagrad, {{"lr_decay", Field::lr_decay}, {"eps", Field::eps}}},
      {Algorithm::sgd,
       {{"momentum", Field::momentum},
        {"dampening", Field::dampening},
        {"nesterov", Field::nesterov}}},
      {Algorithm::rowwise_adagrad,
       {{"eps", Field::eps}, {"decoupled_weight_decay", Field::decoupled_weight_decay}}},
  };
  if (const auto found = common.find(key); found != common.end()) {
    return hyper_.sparse_only && key == "weight_decay" ? Field::none : found->second;
  }
  const auto& fields = own.at(algorithm_);
  const auto found = fields.find(key);
  if (found == fields.end()) return Field::none;
  const bool is_known = !hyper_.sparse_only || key == "betas" || key == "eps";
  return is_known ? found->second : Field::none;
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
double GroupReader::decay_rate(py::handle value, const char* key) const {
  const double rate = number(value, key);
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
  switch (algorithm_) {
    case Algorithm::adam: hyper_.adam.lr = lr; break;
    case Algorithm::adagrad: hyper_.adagrad.lr = lr; break;
    case Algorithm::sgd: hyper_.sgd.lr = lr; break;
    case Algorithm::rowwise_adagrad: hyper_.rowwise_adagrad.lr = lr; break;
  }
}

void GroupReader::read(const Item& item) {
  if (!is_hyperparameter(item.field)) return;
  const py::handle value = item.value;
  AdamHyper& adam = hyper_.adam;
  AdagradHyper& adagrad = hyper_.adagrad;
  SgdHyper& sgd = hyper_.sgd;
  RowwiseAdagradHyper& rowwise = hyper_.rowwise_adagrad;
  const bool is_adam = algorithm_ == Algorithm::adam;
  const bool is_adagrad = algorithm_ == Algorithm::adagrad;
  const bool is_rowwise = algorithm_ == Algorithm::rowwise_adagrad;
  switch (item.field) {
    case Field::none:
    case Field::params: break;
    case Field::lr: read_lr(value, "lr"); break;
    case Field::weight_decay:
      (is_adam      ? adam.weight_decay
       : is_adagrad ? adagrad.weight_decay
       : is_rowwise ? rowwise.weight_decay
                    : sgd.weight_decay) = number(value, "weight_decay");
      break;
    case Field::eps:
      (is_adam ? adam.eps : is_adagrad ? adagrad.eps : rowwise.eps) = number(value, "eps");
      break;
    case Field::betas: {
      if (!PySequence_Check(value.ptr()) || PySequence_Size(value.ptr()) != 2) {
        throw py::type_error(name_ + ": 'betas' must be a pair of numbers");
      }
      const auto betas = py::reinterpret_borrow<py::sequence>(value);
      adam.beta1 = decay_rate(py::object(betas[0]), "betas[0]");
      adam.beta2 = decay_rate(py::object(betas[1]), "betas[1]");
      break;
    }
    case Field::amsgrad: adam.amsgrad = flag(value, "amsgrad"); break;
    case Field::decoupled_weight_decay:
      (is_adam ? adam.decoupled_weight_decay : rowwise.decoupled_weight_decay) =
          flag(value, "decoupled_weight_decay");
      break;
    case Field::lazy: adam.lazy = flag(value, "lazy"); break;
    case Field::lr_decay: adagrad.lr_decay = number(value, "lr_decay"); break;
    case Field::momentum: sgd.momentum = number(value, "momentum"); break;
    case Field::dampening: sgd.dampening = number(value, "dampening"); break;
    case Field::nesterov: sgd.nesterov = flag(value, "nesterov"); break;
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
  if (version_.is_of(group)) return fits_plan();
  const DictVersion version(group);
  if (static_cast<size_t>(PyDict_GET_SIZE(group)) != items_.size()) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  bool any_in_place = false;
  for (Item& item : items_) {
    if (!PyDict_Next(group, &position, &key, &value) || key != item.key.ptr()) return false;
    if (value == item.value.ptr() && !item.in_place) continue;
    if (item.field == Field::params) return false;
    Item now = {item.key, py::reinterpret_borrow<py::object>(value), item.field,
                is_hyperparameter(item.field) && can_change_in_place(value)};
    read(now);  // may raise: only what was read becomes known
    any_in_place |= now.in_place;
    item = std::move(now);
  }
  // With the version of before: reading a value may have run Python. What may change in place is
  // read at every step.
  if (!any_in_place) version_ = version;
  return fits_plan();
}

// Against what the plan was made with: an earlier call may have read a switch and then raised.
bool GroupReader::fits_plan() const {
  return shape_then_ == shape() && was_capturable_ == capturable_;
}

int GroupReader::shape() const {
  switch (algorithm_) {
    case Algorithm::adam: return (hyper_.adam.amsgrad ? 1 : 0) | (hyper_.adam.lazy ? 2 : 0);
    case Algorithm::sgd: return hyper_.sgd.momentum != 0.0;
    case Algorithm::adagrad:
    case Algorithm::rowwise_adagrad: return 0;
  }
  return 0;
}

}  // namespace recap
