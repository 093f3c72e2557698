/* Strict JSON for decoder.c: RFC 8259, UTF-8 only, no key twice in an object, 64 levels. */
#ifndef QLF_KIT_JSON_H
#define QLF_KIT_JSON_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DEPTH = 64, MAX_NODES = 16000000 };

typedef struct Node { /* a JSON value; `text` is the unescaped string, or the first digit of a number */
  struct Node *child, *next;
  char *key, *text;
  size_t key_size, size;
  char type;                     /* { [ " 0 (a number) or w (true, false, null) */
  char surrogate, key_surrogate; /* a lone one: legal JSON, but no Unicode */
} Node;

static void refuse(const char* rule, const char* reason) {
  fprintf(stderr, "[%s] %s\n", rule, reason);
  exit(1);
}

static void* allocate(uint64_t count, size_t size) {
  void* memory = count <= SIZE_MAX / size ? calloc(count ? (size_t)count : 1, size) : NULL;
  if (!memory) refuse("limit", "out of memory");
  return memory;
}

/* The text ends with a NUL that is no part of it. Functions that read return NULL for what is not JSON. */
static char* blank(char* p) {
  return p + strspn(p, " \t\n\r");
}

/* Length of the UTF-8 sequence at p; 0 when it is malformed (too long, a surrogate, above U+10FFFF, cut off). */
static int utf8(const unsigned char* p) {
  int length = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : p[0] >= 0x80 ? 2 : 1;
  if ((p[0] >= 0x80 && p[0] < 0xc2) || p[0] > 0xf4) return 0;
  for (int i = 1; i < length; i++)
    if ((p[i] & 0xc0) != 0x80) return 0;
  if ((p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f)) return 0;
  return (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f) ? 0 : length;
}

static unsigned hex4(const char* p) {
  char digits[5] = {0};
  if (strspn(p, "0123456789abcdefABCDEF") < 4) return 0x110000;
  return (unsigned)strtoul(memcpy(digits, p, 4), NULL, 16);
}

/* Unescape the string at p in place; its bytes are [*text, *text + *size). */
static char* string(char* p, char** text, size_t* size, char* surrogate) {
  static const char plain[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
  if (*p != '"') return NULL;
  char* to = *text = ++p;
  while (*p != '"') {
    int length = utf8((unsigned char*)p);
    if (!length || (unsigned char)*p < 0x20) return NULL;
    if (*p != '\\') {
      memmove(to, p, (size_t)length);
      to += length;
      p += length;
      continue;
    }
    const char* found = p[1] ? strchr(plain, p[1]) : NULL;
    if (found) {
      *to++ = meant[found - plain];
      p += 2;
      continue;
    }
    unsigned code = p[1] == 'u' ? hex4(p + 2) : 0x110000, low = 0;
    if (code == 0x110000) return NULL;
    p += 6;
    if (code >> 10 == 0x36 && p[0] == '\\' && p[1] == 'u' && (low = hex4(p + 2)) >> 10 == 0x37) {
      code = 0x10000 + ((code & 0x3ff) << 10) + (low & 0x3ff);
      p += 6;
    }
    *surrogate |= code >> 11 == 0x1b;
    int more = code >= 0x10000 ? 3 : code >= 0x800 ? 2 : code >= 0x80; /* continuation bytes */
    *to++ = (char)(more ? (0xff << (7 - more) & 0xff) | code >> 6 * more : code);
    while (more--) *to++ = (char)(0x80 | (code >> 6 * more & 63));
  }
  *size = (size_t)(to - *text);
  return p + 1;
}

static char* number(char* p) {
  size_t digits;
  p += *p == '-';
  digits = strspn(p, "0123456789");
  if (!digits || (*p == '0' && digits > 1)) return NULL;
  p += digits;
  if (*p == '.') {
    if (!(digits = strspn(p + 1, "0123456789"))) return NULL;
    p += 1 + digits;
  }
  if (*p != 'e' && *p != 'E') return p;
  p += p[1] == '+' || p[1] == '-' ? 2 : 1;
  return (digits = strspn(p, "0123456789")) ? p + digits : NULL;
}

static int by_key(const void* left, const void* right) {
  const Node *a = *(Node* const*)left, *b = *(Node* const*)right;
  int order = memcmp(a->key, b->key, a->key_size < b->key_size ? a->key_size : b->key_size);
  return order ? order : (a->key_size > b->key_size) - (a->key_size < b->key_size);
}

static int has_repeated_key(const Node* object, size_t count) {
  Node** sorted = allocate(count, sizeof *sorted);
  count = 0;
  for (Node* child = object->child; child; child = child->next) sorted[count++] = child;
  qsort(sorted, count, sizeof *sorted, by_key);
  for (size_t i = 1; i < count; i++)
    if (!by_key(sorted + i - 1, sorted + i)) return 1;
  free(sorted);
  return 0;
}

static char* value(char* p, Node* node, int depth) {
  static int nodes = 0; /* a sound header of 100 MB has fewer */
  p = blank(p);
  if (nodes++ == MAX_NODES || depth > MAX_DEPTH) return NULL;
  node->type = *p;
  node->text = p;
  if (*p == '"') return string(p, &node->text, &node->size, &node->surrogate);
  if (*p != '{' && *p != '[') {
    size_t length = !strncmp(p, "true", 4) || !strncmp(p, "null", 4) ? 4 : !strncmp(p, "false", 5) ? 5 : 0;
    node->type = length ? 'w' : '0';
    return length ? p + length : number(p);
  }
  char open = *p, close = open == '{' ? '}' : ']';
  size_t count = 0;
  Node** last = &node->child;
  for (p = blank(p + 1); *p != close || count; p = blank(p + 1)) {
    Node* child = *last = allocate(1, sizeof *child);
    if (open == '{') {
      if (!(p = string(blank(p), &child->key, &child->key_size, &child->key_surrogate))) return NULL;
      if (*(p = blank(p)) != ':') return NULL;
      p++;
    }
    if (!(p = value(p, child, depth + 1))) return NULL;
    last = &child->next;
    count++;
    if (*(p = blank(p)) == close) break;
    if (*p != ',') return NULL;
  }
  return open == '{' && count && has_repeated_key(node, count) ? NULL : p + 1;
}

/* The JSON object that fills the whole text, or NULL. */
static Node* parse(char* text, size_t size) {
  Node* root = allocate(1, sizeof *root);
  char* end = value(text, root, 0);
  return end && root->type == '{' && blank(end) == text + size ? root : NULL;
}

static const Node* get(const Node* object, const char* key) {
  for (const Node* child = object->child; child; child = child->next)
    if (child->key_size == strlen(key) && !memcmp(child->key, key, child->key_size)) return child;
  return NULL;
}

static size_t children(const Node* node) {
  size_t count = 0;
  for (const Node* child = node->child; child; child = child->next) count++;
  return count;
}

static int is_text(const Node* node, const char* text) {
  return node->type == '"' && node->size == strlen(text) && !memcmp(node->text, text, node->size);
}

/* Whether the node is an integer that is not negative; too large ones become UINT64_MAX. */
static int integer(const Node* node, uint64_t* number) {
  const char* p = node->text;
  size_t digits = node->type == '0' ? strspn(p, "0123456789") : 0;
  *number = 0;
  if (!digits || strchr(".eE", p[digits])) return 0;
  for (; digits; digits--, p++) {
    uint64_t digit = (uint64_t)(*p - '0');
    *number = *number > (UINT64_MAX - digit) / 10 ? UINT64_MAX : *number * 10 + digit;
  }
  return 1;
}

#endif
