// What GCC's headers call in a libstdc++ or glibc later than those of manylinux_2_28, defined here:
// the extension then needs no more of a machine than that. `make wheel` checks it.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__)
template class std::basic_stringbuf<char>;
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;

#if _GLIBCXX_RELEASE >= 11
void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }
#endif

// Says that the process may have several threads: reference counts are atomic then.
extern "C" {
char __libc_single_threaded = 0;
}
#endif
