// Checks for the unit tests: a failed one is reported and counted, and the program goes on.

#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <string>

inline int & check_failures() {
    static int n = 0;
    return n;
}

inline bool check_failed(const char * file, int line, const std::string & what) {
    fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
    check_failures()++;
    return false;
}

// the program's exit code
inline int check_result(const char * name) {
    printf("%s: %s\n", name, check_failures() ? "FAILED" : "ok");
    return check_failures() ? 1 : 0;
}

// each is an expression: true if the check held

#define CHECK(cond) ((cond) || check_failed(__FILE__, __LINE__, #cond))

#define CHECK_EQ(a, b) check_eq(__FILE__, __LINE__, #a " == " #b, (a), (b))

#define CHECK_NEAR(a, b, tol) check_near(__FILE__, __LINE__, #a " ~ " #b, (double) (a), (double) (b), (double) (tol))

// the text holds a part
#define CHECK_HAS(text, part) check_has(__FILE__, __LINE__, (text), (part))

// expr throws a std::exception whose text holds a part
#define CHECK_THROWS(expr, part)                                      \
    do {                                                              \
        try {                                                         \
            (void) (expr);                                            \
            check_failed(__FILE__, __LINE__, #expr " did not throw"); \
        } catch (const std::exception & e) {                          \
            check_has(__FILE__, __LINE__, e.what(), (part));          \
        }                                                             \
    } while (0)

template <typename A, typename B>
bool check_eq(const char * file, int line, const char * what, const A & a, const B & b) {
    return a == (A) b ||
           check_failed(file, line, std::string(what) + ": " + std::to_string(a) + ", " + std::to_string(b));
}

inline bool check_near(const char * file, int line, const char * what, double a, double b, double tol) {
    return std::fabs(a - b) <= tol ||
           check_failed(file, line, std::string(what) + ": " + std::to_string(a) + ", " + std::to_string(b));
}

inline bool check_has(const char * file, int line, const std::string & text, const std::string & part) {
    return text.find(part) != std::string::npos ||
           check_failed(file, line, "\"" + text + "\" does not say \"" + part + "\"");
}
