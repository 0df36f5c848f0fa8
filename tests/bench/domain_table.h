#pragma once

#include "tests/bench/harness.h"

namespace mvgpu::bench {

// What the api-only domain costs, against the limits of the machine and the ways others do it. One
// function for each topic; the rows' names begin with what the topic is.
void MeasureTranslation(Table* table);  // translate_rows.cc
void MeasurePins(Table* table);         // pin_rows.cc
void MeasureThreads(Table* table);      // thread_rows.cc
void MeasureRanges(Table* table);       // range_rows.cc
void MeasureFirstPins(Table* table);    // first_pin_rows.cc
void MeasureMemory(Table* table);       // memory_rows.cc
void MeasureMapping(Table* table);      // mapping_rows.cc

// All of them: --table=domain.
inline void MeasureDomain(Table* table) {
  MeasureTranslation(table);
  MeasurePins(table);
  MeasureThreads(table);
  MeasureRanges(table);
  MeasureFirstPins(table);
  MeasureMemory(table);
  MeasureMapping(table);
}

}  // namespace mvgpu::bench
