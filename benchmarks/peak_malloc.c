/* Preloaded into a process, counts the bytes that malloc and its kin hold, from every thread.
   glibc only: __libc_* are its own entry points, so nothing has to be looked up. */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

static atomic_long held, peak;

static void* taken(void* p) {
  long now = atomic_fetch_add(&held, (long)malloc_usable_size(p)) + (long)malloc_usable_size(p);
  long old = atomic_load(&peak);
  while (now > old && !atomic_compare_exchange_weak(&peak, &old, now)) {
  }
  return p;
}

static void given_back(void* p) { atomic_fetch_sub(&held, (long)malloc_usable_size(p)); }

void* malloc(size_t size) { return taken(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return taken(__libc_calloc(count, size)); }
void* memalign(size_t alignment, size_t size) { return taken(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** p, size_t alignment, size_t size) {
  *p = memalign(alignment, size);
  return *p || !size ? 0 : ENOMEM;
}

void* realloc(void* p, size_t size) {
  long before = (long)malloc_usable_size(p);
  void* moved = __libc_realloc(p, size);
  if (moved || !size) atomic_fetch_sub(&held, before);
  return taken(moved);
}

void free(void* p) {
  given_back(p);
  __libc_free(p);
}

/* Count from here: what is held now is not counted. */
void peak_malloc_reset(void) {
  atomic_store(&held, 0);
  atomic_store(&peak, 0);
}

long peak_malloc_bytes(void) { return atomic_load(&peak); }
