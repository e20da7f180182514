// The kernels of one instruction set, as a table that the choice at run time can point to.
#include "isa.h"
#include "work.h"

namespace normkit::NORMKIT_ISA {

void planes_forward(const Work&, const Forward&);
void planes_backward(const Work&, const Backward&);
void columns_forward(const Work&, const Forward&);
void columns_backward(const Work&, const Backward&);
void rows_forward(const Work&, const Forward&);
void rows_backward(const Work&, const Backward&);
void tiles_forward(const Work&, const Forward&);
void tiles_backward(const Work&, const Backward&);
void lstm_forward(const LstmStep&);
void lstm_backward(const LstmStep&);

#define NORMKIT_TEXT(name) #name
#define NORMKIT_NAME(name) NORMKIT_TEXT(name)

extern const Kernels table;
const Kernels table = {
    NORMKIT_NAME(NORMKIT_ISA), NORMKIT_TYPES, planes_forward, planes_backward, columns_forward, columns_backward,
    rows_forward,              rows_backward, tiles_forward,  tiles_backward, lstm_forward,    lstm_backward};

}  // namespace normkit::NORMKIT_ISA
