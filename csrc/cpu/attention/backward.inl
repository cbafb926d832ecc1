#pragma once
#include "softmax.h"
#include "storage.h"
namespace hierkernels { namespace HK_ISA { namespace {
template <class F> struct Backward { Backward(const AttentionParams&, const Storage<F>&) {} void run() {} };
}}}
