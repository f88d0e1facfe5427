// Between the two halves of the Hopper emulator.
#pragma once

#include "emulator_sm90.h"

namespace qcompile::cuda::sm90 {

extern Fault planted;  // of the launch that runs

void wgmma_begin();    // of a thread: nothing is under way
void wgmma_end();      // of a thread: fails where something is

}  // namespace qcompile::cuda::sm90
