/* What the C tests have in common: expectations that are counted, and said where they fail. */
#ifndef EXPECT_H
#define EXPECT_H

#include <stdio.h>
#include <string.h>

#include "kvfabric.h"

static int passed = 0;
static int failed = 0;

static void expect(int holds, const char *what, const char *file, int line)
{
    if (holds) {
        passed++;
    } else {
        failed++;
        fprintf(stderr, "%s:%d: %s (last error: %s)\n", file, line, what, kvf_last_error());
    }
}

#define EXPECT(condition) expect((condition), #condition, __FILE__, __LINE__)
#define EXPECT_STATUS(wanted, call) expect((call) == (wanted), #call " answers " #wanted, __FILE__, __LINE__)
#define EXPECT_TEXT(part) expect(strstr(kvf_last_error(), (part)) != NULL, "text has " #part, __FILE__, __LINE__)

/* No handle; must still be there after a call that failed. */
#define UNTOUCHED(type) ((type *)(void *)&passed)

#endif
