#pragma once

namespace mvgpu::domain {

// An interrupt with a mask and a pending bit (IM and IP of FECTL_REG, IECTL_REG, PECTL_REG): while
// it is masked, it is kept. It is masked at first.
class MaskedEvent {
 public:
  // Whether it is to be delivered now.
  [[nodiscard]] bool raise() {
    is_pending_ = is_masked_;
    return !is_masked_;
  }
  // Whether one that was kept is to be delivered now.
  [[nodiscard]] bool set_masked(bool masked) {
    is_masked_ = masked;
    const bool is_due = !masked && is_pending_;
    if (is_due) is_pending_ = false;
    return is_due;
  }
  // What it was for has gone.
  void drop() { is_pending_ = false; }
  bool is_masked() const { return is_masked_; }
  bool is_pending() const { return is_pending_; }

 private:
  bool is_masked_ = true;
  bool is_pending_ = false;
};

}  // namespace mvgpu::domain
