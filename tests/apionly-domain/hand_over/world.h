#pragma once

// A VM with two vGPUs and two assigned devices, against a naive reference: for each page of RAM who
// holds it, and how many device mappings show it. After each operation every page that a vGPU holds
// is locked for it iff no device's mapping has it, and the ledger has every page once.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace mvgpu::domain::hand_over {

class World {
 public:
  World();
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  // Any number is an operation: who, what and where, and which call of the kernel fails.
  void Step(uint64_t operation);
  // Everything goes.
  void Finish();
  // What went wrong first, and the operations that led to it; empty when nothing did. The world is
  // not to be destroyed then.
  const std::string& problem() const { return problem_; }

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
  std::string problem_;
};

}  // namespace mvgpu::domain::hand_over
