// What every step looks at in a slot, packed: the checks that its tensors are still those of the
// plan, and the reading of a gradient of the usual kind. What a probe cannot decide, SlotTensors
// does.
//
// A slot is spread over dozens of cache lines: Python objects, tensor and storage headers,
// autograd metadata. Backward has evicted them by the time the optimizer runs, so a probe knows
// them all in advance and `prefetch` asks for them a few slots ahead, all at once instead of one
// behind another.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../algorithms/updates.h"
#include "local_tensor.h"
#include "python.h"
#include "snapshot.h"
#include "state_block.h"

// What is prefetched may be gone: of it, only the address of a member is taken, and nothing read.
// To a sanitizer, that alone is a use of it.
#define RECAP_MAY_BE_GONE [[gnu::no_sanitize_address, gnu::no_sanitize_undefined]]

namespace recap {

// How many slots ahead a step reads, to hide the latency of memory that backward has evicted.
constexpr size_t kPrefetchSlots = 8;

constexpr int kMaxProbed = kMaxStates + 1;  // the states and the step count

// The gradient, without the warning that Tensor::grad() gives of tensors that are no leaves.
inline const at::Tensor& gradient_in(const c10::AutogradMetaInterface* meta) {
  static const at::Tensor none;
  return meta ? static_cast<const torch::autograd::AutogradMeta*>(meta)->grad_ : none;
}

inline const at::Tensor& gradient_of(const c10::TensorImpl* impl) {
  return gradient_in(impl->autograd_meta());
}

// Four cache lines for a slot that is no DTensor: steps over many small tensors wait for memory.
class alignas(64) Probe {
 public:
  // Of an inert slot: sees whether the parameter is the same and has no gradient still.
  explicit Probe(PyObject* param)
      : object_(param), leaf_(THPVariable_Unpack(param).unsafeGetTensorImpl()), inert_(true) {}

  // `states` are the tensors that the plan holds addresses of, and `step` the step count, or null.
  // `shard` is the local one of a parameter that is a DTensor, else null. `entries` are the values
  // in the state dict that must stay; without a `state_dict`, `unchanged` sees none of them.
  // Gradients are of `grad_type`; without `takes_plain`, none is plain. `alike`: states have the
  // shape of the parameter.
  // What has its memory of a StateBlock is watched by the block, which goes to `blocks`. The caller
  // keeps all objects alive.
  Probe(PyObject* param, PyObject* shard, const std::vector<PyObject*>& states, PyObject* step,
        PyObject* state_dict, const std::vector<PyObject*>& entries, at::ScalarType grad_type,
        bool takes_plain, bool alike, std::vector<std::shared_ptr<StateBlock>>& blocks)
      : object_(param), alike_(alike), state_dict_(state_dict) {
    leaf_ = THPVariable_Unpack(param).unsafeGetTensorImpl();
    impl_ = shard ? THPVariable_Unpack(shard).unsafeGetTensorImpl() : leaf_;
    if (shard) sharded_ = std::make_unique<Sharded>(Sharded{shard, spec_of(param), {}, {}});
    storage_ = impl_->unsafe_storage().unsafeGetStorageImpl();
    // Materializes memory that is shared until it is written to; its data pointer has a context of
    // its own again from then on.
    data_ = at_offset(impl_, storage_->mutable_data());
    size_ = impl_->numel();
    dtype_ = impl_->dtype();
    grad_dtype_ = c10::scalarTypeToTypeMeta(grad_type);
    device_ = impl_->device();
    keys_ = impl_->key_set();
    contiguous_ = impl_->is_contiguous();
    reads_plain_ = contiguous_ && takes_plain;
    flat_ = impl_->dim() <= 1;
    for (PyObject* const state : states) watch_state(state, blocks);
    if (step) watch_state(step, blocks);
    has_step_ = step != nullptr;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    usual_ = contiguous_ && alike_ && state_dict;
    while (state_dict && item_count_ < kMaxProbed &&
           PyDict_Next(state_dict, &position, &key, &value)) {
      const bool must_stay = std::find(entries.begin(), entries.end(), value) != entries.end();
      watch_item(item_count_++, must_stay ? value : nullptr);
    }
    if (state_dict) usual_ &= PyDict_GET_SIZE(state_dict) == item_count_;
  }

  // Whether `unchanged` sees all there is to see; otherwise SlotTensors::unchanged sees the rest.
  bool usual() const { return usual_; }

  void bump_version() const {
    leaf_->bump_version();
    if (sharded_) impl_->bump_version();
  }

  // For `bump_version`: first the pointer, then what it writes to.
  void prefetch_leaf() const { __builtin_prefetch(&leaf_->version_counter()); }
  void prefetch_version() const {
    const c10::VariableVersion& version = leaf_->version_counter();
    static_assert(sizeof(version) == sizeof(void*));
    const void* counter;
    std::memcpy(&counter, &version, sizeof(counter));
    __builtin_prefetch(counter, 1);
  }

  RECAP_MAY_BE_GONE void prefetch() const {
    prefetch_object(object_);
    prefetch_tensor(leaf_);
    if (storage_) prefetch_storage(storage_);
    if (meta_) __builtin_prefetch(&static_cast<const torch::autograd::AutogradMeta*>(meta_)->grad_);
    if (last_grad_) {
      prefetch_tensor(last_grad_);
      prefetch_storage(last_grad_storage_);
    }
    prefetch_object(state_dict_);
    for (int k = 0; k < state_count_; ++k) {
      if (!in_header(k)) prefetch_object(states_[k].object);
      __builtin_prefetch(&states_[k].impl->unsafe_storage());
      if (is_fixed(k)) continue;
      prefetch_geometry(states_[k].impl);
      if (in_block(k)) continue;
      prefetch_storage(states_[k].storage);
    }
  }

  // Whether the parameter and its states are the tensors of the plan, at the same addresses and
  // with as many elements in the same order; of tensors that are not contiguous,
  // SlotTensors::unchanged sees the order.
  bool unchanged() {
    if (is_swapped()) return false;
    if (inert_) return !gradient_of(leaf_).defined();
    if (sharded_ && !shard_unchanged()) return false;
    if (impl_->dtype() != dtype_ || impl_->numel() != size_ ||
        impl_->is_contiguous() != contiguous_ ||
        !same_memory(impl_, impl_->unsafe_storage().unsafeGetStorageImpl(), data_)) {
      return false;
    }
    for (int k = 0; k < state_count_; ++k) {
      if (!states_[k].same_storage(in_header(k))) return false;
      if (!is_fixed(k) && !same_geometry(k)) return false;
    }
    return !state_dict_ || items_version_.is_of(state_dict_) || items_unchanged();
  }

  // After a block has said that some of its memory was released: whether it was none of these.
  bool same_blocks() const {
    for (int k = 0; k < state_count_; ++k) {
      const State& state = states_[k];
      if (in_block(k) && !(state.same_storage(in_header(k)) &&
                           same_memory(state.impl, state.storage, state.data))) {
        return false;
      }
    }
    return true;
  }

  const at::Tensor& grad() {
    meta_ = leaf_->autograd_meta();
    return gradient_in(meta_);
  }

  // The address of `grad` if it can be read as it is: dense, of the planned dtype, the parameter's
  // device and shape, and both contiguous; of a DTensor's local shard, if the other is sharded by
  // the same spec, or by one that was accepted. Else null.
  const void* plain(const at::Tensor& grad) {
    if (!sharded_) return plain_memory(grad);
    // Made in Python, it has an object there.
    const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
    PyObject* const local = local_shard(object.ptr());
    PyObject* const spec = spec_of(object.ptr());
    if (!local || (spec != sharded_->spec && spec != sharded_->grad_spec.ptr())) return nullptr;
    return plain_memory(THPVariable_Unpack(local));
  }

  // Gradients with the spec of this one, which was found to be alike, are plain from now on.
  void accept_spec_of(const at::Tensor& grad) {
    const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
    if (sharded_ && local_shard(object.ptr())) {
      sharded_->grad_spec = py::reinterpret_borrow<py::object>(spec_of(object.ptr()));
    }
  }

 private:
  // Another tensor is in the parameter's object; that of the plan may be gone.
  bool is_swapped() const { return THPVariable_Unpack(object_).unsafeGetTensorImpl() != leaf_; }

  bool shard_unchanged() const {
    return held_shard(object_) == sharded_->shard &&
           THPVariable_Unpack(sharded_->shard).unsafeGetTensorImpl() == impl_ &&
           spec_of(object_) == sharded_->spec;
  }

  void watch_state(PyObject* state, std::vector<std::shared_ptr<StateBlock>>& blocks) {
    c10::TensorImpl* const impl = THPVariable_Unpack(state).unsafeGetTensorImpl();
    c10::StorageImpl* const storage = impl->unsafe_storage().unsafeGetStorageImpl();
    auto block = impl->storage_offset() == 0 ? StateBlock::of(*storage) : nullptr;
    if (block) {
      in_block_ |= 1 << state_count_;
      if (StateBlock::made(*impl)) in_header_ |= 1 << state_count_;
      if (impl->numel() == 1 && !holds(storage, impl->itemsize() + 1)) fixed_ |= 1 << state_count_;
      blocks.push_back(std::move(block));
    }
    states_[state_count_++] = {state, impl, storage, at_offset(impl, storage->mutable_data())};
  }

  // Its header stays readable whatever became of the tensor.
  bool in_header(int state) const { return in_header_ >> state & 1; }

  bool in_block(int state) const { return in_block_ >> state & 1; }

  // Of the one element in a storage of its size there is nothing to see but the storage.
  bool is_fixed(int state) const { return fixed_ >> state & 1; }

  bool same_geometry(int k) const {
    const c10::TensorImpl* const impl = states_[k].impl;
    if (in_block(k) ? impl->storage_offset() != 0
                    : !same_memory(impl, states_[k].storage, states_[k].data)) {
      return false;
    }
    if (has_step_ && k == state_count_ - 1) return impl->numel() == 1;
    return !alike_ ||
           (impl->numel() == size_ &&
            (!contiguous_ || (impl->is_contiguous() && (flat_ || same_sizes(impl, impl_)))));
  }

  // `value` is what must stay at this place of the state dict; null: whatever it is.
  void watch_item(int place, PyObject* value) {
    state_of_item_[place] = -1;
    if (sharded_) {
      sharded_->items[place] = value;
    } else if (value) {
      int state = 0;
      while (state < state_count_ && states_[state].object != value) ++state;
      if (state < state_count_) {
        state_of_item_[place] = static_cast<int8_t>(state);
      } else {
        usual_ = false;
      }
    }
  }

  PyObject* watched_item(int place) const {
    if (sharded_) return sharded_->items[place];
    return state_of_item_[place] < 0 ? nullptr : states_[state_of_item_[place]].object;
  }

  bool items_unchanged() {
    const DictVersion version(state_dict_);
    if (usual_ && PyDict_GET_SIZE(state_dict_) != item_count_) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (int k = 0; k < item_count_; ++k) {
      if (!PyDict_Next(state_dict_, &position, &key, &value)) return false;
      PyObject* const watched = watched_item(k);
      if (watched && value != watched) return false;
    }
    items_version_ = version;
    return true;
  }

  const void* plain_memory(const at::Tensor& grad) {
    const c10::TensorImpl* impl = grad.unsafeGetTensorImpl();
    // With the keys of the parameter it is a tensor of the same kind. One of other keys may be,
    // too: a tensor made in inference mode has fewer.
    if (impl->key_set() != keys_ &&
        (impl->key_set().has_any(kWrapperKeys | kLazyKeys) || impl->layout() != at::kStrided)) {
      return nullptr;
    }
    if (!reads_plain_ || impl->dtype() != grad_dtype_ || impl->device() != device_ ||
        !impl->is_contiguous() || impl->numel() != size_) {
      return nullptr;
    }
    // Of one dimension, as many elements are the same ones in the same order.
    if (!flat_ && !same_sizes(impl, impl_)) return nullptr;
    last_grad_ = impl;
    last_grad_storage_ = impl->unsafe_storage().unsafeGetStorageImpl();
    const auto itemsize = static_cast<int64_t>(grad_dtype_.itemsize());
    const int64_t offset = impl->storage_offset() * itemsize;
    const void* const data = last_grad_storage_->_mutable_data_ptr_no_checks().get();
    if (!data || !holds(last_grad_storage_, offset + size_ * itemsize)) return nullptr;
    const char* const address = static_cast<const char*>(data) + offset;
    // Elements that are not at multiples of their size are copied first.
    return reinterpret_cast<uintptr_t>(address) & (itemsize - 1) ? nullptr : address;
  }

  static bool same_sizes(const c10::TensorImpl* a, const c10::TensorImpl* b) {
    const auto sizes = a->sizes(), expected = b->sizes();
    if (sizes.size() != expected.size()) return false;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] != expected[i]) return false;
    }
    return true;
  }

  // Of a DTensor: the local one, mesh and placements, and the items that must stay in its state.
  struct Sharded {
    PyObject* shard;
    PyObject* spec;
    PyObject* items[kMaxProbed];
    py::object grad_spec;  // another one, which says the same
  };

  struct State {
    PyObject* object;  // torch.utils.swap_tensors gives it another tensor
    const c10::TensorImpl* impl;
    c10::StorageImpl* storage;
    const void* data;

    // The tensor that the object had may be gone; what a block has made stays readable then.
    [[gnu::no_sanitize_undefined]] bool same_storage(bool in_header) const {
      return (in_header ? impl->pyobj_slot()->load_pyobj() == object
                        : THPVariable_Unpack(object).unsafeGetTensorImpl() == impl) &&
             impl->unsafe_storage().unsafeGetStorageImpl() == storage;
    }
  };

  // Of one dimension or none, the sizes in the middle are not looked at.
  RECAP_MAY_BE_GONE void prefetch_tensor(const c10::TensorImpl* impl) const {
    const char* const bytes = reinterpret_cast<const char*>(impl);
    if (flat_) {
      __builtin_prefetch(&impl->unsafe_storage());
      prefetch_geometry(impl);
    } else {
      for (size_t offset = 0; offset < sizeof(*impl); offset += 64) {
        __builtin_prefetch(bytes + offset);
      }
    }
    __builtin_prefetch(bytes + sizeof(*impl) - 1);
  }

  // The pointer to its memory, with the deleter, and behind these its size.
  RECAP_MAY_BE_GONE static void prefetch_storage(c10::StorageImpl* storage) {
    const c10::DataPtr* const memory = &storage->_mutable_data_ptr_no_checks();
    __builtin_prefetch(memory);
    __builtin_prefetch(memory + 1);
  }

  // Where a tensor has its offset and number of elements: towards the end.
  RECAP_MAY_BE_GONE static void prefetch_geometry(const c10::TensorImpl* impl) {
    __builtin_prefetch(reinterpret_cast<const char*>(impl) + sizeof(*impl) - 32);
  }

  static bool holds(const c10::StorageImpl* storage, int64_t bytes) {
    return static_cast<int64_t>(storage->nbytes()) >= bytes;
  }

  // Also tells whether somebody has come to share it until it is written to, as torch._lazy_clone
  // does: a deleter of another kind says so, in the cache line of the pointer.
  static bool same_memory(const c10::TensorImpl* impl, c10::StorageImpl* storage,
                          const void* data) {
    const c10::DataPtr& memory = storage->_mutable_data_ptr_no_checks();
    return at_offset(impl, memory.get()) == data && !is_copied_on_write(memory);
  }

  static void* at_offset(const c10::TensorImpl* impl, void* data) {
    const auto bytes = impl->storage_offset() * static_cast<int64_t>(impl->itemsize());
    return data ? static_cast<char*>(data) + bytes : nullptr;
  }

  PyObject* object_;
  c10::TensorImpl* leaf_;            // the parameter, which has the gradient
  c10::TensorImpl* impl_ = nullptr;  // that with the memory: the parameter or its local shard
  c10::StorageImpl* storage_ = nullptr;
  const void* data_ = nullptr;
  int64_t size_ = 0;
  c10::DispatchKeySet keys_;
  caffe2::TypeMeta dtype_, grad_dtype_;
  at::Device device_ = at::kCPU;
  bool inert_ = false;
  bool contiguous_ = false;
  bool reads_plain_ = false;
  bool alike_ = true;
  bool usual_ = true;
  bool flat_ = false;  // of one dimension or none
  bool has_step_ = false;
  uint8_t in_block_ = 0;   // a bit for each state
  uint8_t fixed_ = 0;      // as well
  uint8_t in_header_ = 0;  // as well
  int8_t state_count_ = 0;
  int8_t item_count_ = 0;
  int8_t state_of_item_[kMaxProbed];  // -1: whatever it is
  State states_[kMaxProbed];
  PyObject* state_dict_ = nullptr;
  std::unique_ptr<Sharded> sharded_;
  DictVersion items_version_;
  // Hints for `prefetch` only: where these were in the last step.
  const c10::AutogradMetaInterface* meta_ = nullptr;
  const c10::TensorImpl* last_grad_ = nullptr;
  c10::StorageImpl* last_grad_storage_ = nullptr;
};
static_assert(sizeof(Probe) == 256);

}  // namespace recap
