// Writing and reading the fault board and the abort words.
#pragma once

#include <cstdint>
#include <optional>

#include "ep/heap.h"

namespace ep::host {

// What an operation is, for the records of whatever goes wrong in it.
struct Where {
    Op op;
    int32_t chain;
};

// Records a fatal fault that this rank noticed (the first one wins) and tells every rank.
void fail(const Context& context, Where where, FaultCode code, int peer, uint64_t expected,
          uint64_t seen);

// True if this rank may go on: nobody gave up but ranks that are masked here. Otherwise records
// whose abort stopped it.
bool may_run(const Context& context, Where where);

// Adds `dropped` entries to the routing record. `first` is the first bad expert number.
void record_routing(const Context& context, Where where, uint32_t dropped, int64_t first);

std::optional<Fault> read_fault(const Fault& record);
void clear_faults(FaultBoard* board);

}  // namespace ep::host
