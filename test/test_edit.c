/*
 * test_edit.c - the KNE method on tiny random models.
 */
#include "test_edit_attrib.h"
#include "test_edit_ref.h"

int
main(void)
{
    kne_err err;

    if (!ok(kne_cpu_backend_new(2, getenv("KNE_TEST_ISA"), &be, &err), &err))
        return 1;
    test_attribution();
    test_references();
    kne_cpu_backend_free(be);
    return kne_test_done();
}
