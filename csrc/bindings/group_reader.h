// Reads the hyperparameters of one torch param group, again only where the group's dict changed.
#pragma once

#include <string>
#include <vector>

#include "../plan/step.h"
#include "format_options.h"
#include "python.h"
#include "snapshot.h"

namespace recap {

class alignas(64) GroupReader {
 public:
  // `name` is how errors call the group. With `device_values`, a learning rate in the memory of a
  // device that can read it there is left there. Raises KeyError, TypeError or ValueError naming
  // the group and the field.
  GroupReader(const std::string& algorithm, py::dict group, std::string name, bool clears_grads,
              bool device_values);

  // Brings `hyper()` up to date. Returns false if what changed needs another plan: which states the
  // algorithm keeps, whether it goes by rows, or which keys the group has.
  bool refresh();

  // Ask for the memory that `refresh` reads: first the one, then the other.
  void prefetch() const {
    prefetch_object(group_.ptr());
    __builtin_prefetch(items_.data());
  }
  void prefetch_items() const { recap::prefetch_items(group_.ptr()); }

  const std::string& name() const { return name_; }
  const Hyper& hyper() const { return hyper_; }  // its lr is NaN if it is in device memory
  bool capturable() const { return capturable_; }
  const FormatOptions& formats() const { return formats_; }
  // The learning rate in device memory; undefined if it is hyper's.
  const at::Tensor& device_lr() const { return device_lr_; }

  // Every Python object that this one owns.
  template <typename Visit>
  void each_reference(Visit&& visit) const {
    visit(group_);
    for (const Item& item : items_) {
      visit(item.key);
      visit(item.value);
    }
  }

 private:
  enum class Field : uint8_t {
    none,
    params,
    lr,
    maximize,
    capturable,
    differentiable,
    option,
    format
  };

  // What every step compares; a rate that is a float is read and not held, since schedulers make a
  // new one for each step, and to free the former would take longer. What a field means is kept
  // apart: read only where one has changed.
  struct Item {
    py::object key, value;
  };
  struct Meaning {
    Field field;
    uint8_t option;  // which of the algorithm's or of the formats', if it is one
    bool in_place;   // a tensor, say, whose value may change while the object stays
  };

  static bool is_hyperparameter(Field field) {
    return field != Field::none && field != Field::params;
  }

  Meaning meaning(py::handle key, py::handle value) const;
  const Option* option_named(const std::string& key) const;
  void read(Meaning meaning, py::handle value);
  const Option* options() const;
  void read_option(const Option& option, py::handle value);
  void read_format(int option, py::handle value);
  double number(py::handle value, const char* key) const;
  double decay_rate(py::handle value, const std::string& key) const;
  bool flag(py::handle value, const char* key) const;
  void read_lr(py::handle value, const char* key);
  void take_lr(double lr, size_t item);  // of a float, which is the value of that item
  bool fits_plan() const;

  // What every step reads, side by side: models may have a group for each tensor.
  py::dict group_;
  DictVersion version_;
  DictItems in_memory_;
  std::vector<Item> items_;
  bool fits_ = true;  // at that version
  bool any_in_place_ = false;
  bool capturable_ = false;
  bool was_capturable_ = false;  // `capturable` of the plan
  bool device_values_;
  int shape_then_ = 0;  // of the plan's hyper()
  Hyper hyper_;

  std::vector<Meaning> meanings_;         // of the items
  FormatOptions formats_, formats_then_;  // the latter those of the plan
  std::string name_;
  at::Tensor device_lr_;
};

}  // namespace recap
