package flatten

import "strings"

// maxCommands bounds the commands that are predicted for one script.
const maxCommands = 8

// shellCommands predicts which programs a shell script ends up running: each command
// behind an exec, and the last command; of the text of `sh -c`, the first command too.
// It expands words whose values the script, its arguments and its environment give, and
// omits a command whose name it cannot expand. It takes every branch and every body of
// a loop as if it ran. The caller uses only commands that are programs of the image.
func shellCommands(text string, inline bool, zero string, args []string, env map[string]string) [][]string {
	p := &shellParser{text: text, args: args, vars: map[string]string{"0": zero, "BASH_SOURCE": zero}, env: env}
	var first, last []string
	var execs [][]string
	for n := 0; ; {
		words, ok := p.command()
		if !ok {
			break
		}
		if words = p.plain(words); len(words) == 0 {
			continue
		}
		if n++; words[0] == "exec" {
			if words = execed(words[1:]); len(words) > 0 && len(execs) < maxCommands {
				execs = append(execs, words)
			}
		} else if n == 1 {
			first = words
		} else {
			last = words
		}
	}
	if len(execs) == 0 && last == nil {
		last, first = first, nil
	}
	var found [][]string
	if inline && first != nil {
		found = append(found, first)
	}
	if len(execs) == 0 && last != nil {
		found = append(found, last)
	}
	return append(found, execs...)
}

// execed returns the command after exec and its options.
func execed(words []string) []string {
	for len(words) > 0 && strings.HasPrefix(words[0], "-") {
		if words[0] == "-a" && len(words) > 1 {
			words = words[1:]
		}
		words = words[1:]
	}
	return words
}

// shellParser cuts a script into simple commands.
type shellParser struct {
	text string
	at   int
	args []string
	vars map[string]string // variables that the script has set so far
	env  map[string]string
	here []string // end words of the here-documents that begin on the next line
}

// unknown replaces the part of a word that the parser cannot know. No file name
// contains it.
const unknown = "\x00"

// word is a word that is being read.
type word struct {
	b   []byte
	any bool // the word exists, even if it is empty
}

func (w *word) put(s string) {
	if w.any = true; len(w.b) > maxString {
		s = unknown // no file has a name that long either
	}
	if len(w.b) <= maxString+1 {
		w.b = append(w.b, s...)
	}
}

func (w *word) end(words []string) []string {
	if w.any {
		words = append(words, string(w.b))
	}
	*w = word{}
	return words
}

// command returns the words of the next simple command, or none between two separators.
// ok is false at the end of the text.
func (p *shellParser) command() (words []string, ok bool) {
	var w word
	for p.at < len(p.text) {
		c := p.text[p.at]
		p.at++
		switch c {
		case '\n', ';', '&', '|', '(', ')':
			if c == '\n' {
				p.skipHere()
			}
			return w.end(words), true
		case ' ', '\t', '\r':
			words = w.end(words)
		case '#':
			if w.any {
				w.put("#")
			} else if i := strings.IndexByte(p.text[p.at:], '\n'); i >= 0 {
				p.at += i
			} else {
				p.at = len(p.text)
			}
		case '\\':
			if p.at < len(p.text) {
				if p.text[p.at] != '\n' {
					w.put(p.text[p.at : p.at+1])
				}
				p.at++
			}
		case '\'':
			i := strings.IndexByte(p.text[p.at:], '\'')
			if i < 0 {
				i = len(p.text) - p.at
			}
			w.put(p.text[p.at : p.at+i])
			p.at = min(len(p.text), p.at+i+1)
		case '"':
			words = p.quoted(&w, words)
		case '<', '>':
			if isNumber(string(w.b)) {
				w = word{}
			}
			words = w.end(words)
			p.redirect()
		case '$', '`':
			words = p.expand(c, &w, words, false)
		default:
			w.put(p.text[p.at-1 : p.at])
		}
		if len(words) > maxArgs {
			words = words[:maxArgs]
		}
	}
	words = w.end(words)
	return words, len(words) > 0
}

func isNumber(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// quoted reads up to the closing double quote.
func (p *shellParser) quoted(w *word, words []string) []string {
	// "$@" expands to one word for each argument, so to none without arguments.
	if rest := p.text[p.at:]; !w.any && (strings.HasPrefix(rest, `$@"`) || strings.HasPrefix(rest, `${@}"`)) {
		p.at += strings.IndexByte(rest, '"') + 1
		return append(words, p.args...)
	}
	w.any = true
	for p.at < len(p.text) {
		c := p.text[p.at]
		p.at++
		switch c {
		case '"':
			return words
		case '\\':
			if p.at < len(p.text) {
				if p.text[p.at] != '\n' {
					w.put(p.text[p.at : p.at+1])
				}
				p.at++
			}
		case '$', '`':
			words = p.expand(c, w, words, true)
		default:
			w.put(p.text[p.at-1 : p.at])
		}
	}
	return words
}

// expand reads an expansion, from after its dollar sign or backquote on.
func (p *shellParser) expand(c byte, w *word, words []string, quoted bool) []string {
	w.any = true
	rest := p.text[p.at:]
	switch {
	case c == '`':
		i := strings.IndexByte(rest, '`')
		if i < 0 {
			i = len(rest) - 1
		}
		p.at += i + 1
		w.put(unknown)
	case strings.HasPrefix(rest, "("):
		p.at += closing(rest, '(', ')')
		w.put(unknown)
	case strings.HasPrefix(rest, "{"):
		n := closing(rest, '{', '}')
		p.at += n
		body := strings.TrimSuffix(rest[1:n], "}")
		name := body[:nameLength(body)]
		switch op := body[len(name):]; {
		case body == `1+"$@"` || body == "@" || body == "*":
			return p.all(w, words)
		case op == "":
			p.value(name, w, quoted)
		case strings.HasPrefix(op, ":-") || strings.HasPrefix(op, ":="):
			if v, ok := p.lookup(name); ok && v != "" {
				w.put(v)
			} else if v := strings.Trim(op[2:], `"'`); !strings.ContainsAny(v, "$`") {
				w.put(v)
			} else {
				w.put(unknown)
			}
		default:
			w.put(unknown)
		}
	case strings.HasPrefix(rest, "@"), strings.HasPrefix(rest, "*"):
		p.at++
		return p.all(w, words)
	default:
		n := nameLength(rest)
		if n == 0 {
			w.put("$")
			break
		}
		p.at += n
		p.value(rest[:n], w, quoted)
	}
	return words
}

// all expands to the arguments of the script.
func (p *shellParser) all(w *word, words []string) []string {
	if len(w.b) > 0 {
		w.put(unknown)
		return words
	}
	*w = word{}
	return append(words, p.args...)
}

func (p *shellParser) value(name string, w *word, quoted bool) {
	v, ok := p.lookup(name)
	if !ok || !quoted && strings.ContainsAny(v, " \t\n*?") {
		w.put(unknown) // it would expand to several words
		return
	}
	w.put(v)
}

func (p *shellParser) lookup(name string) (string, bool) {
	if v, ok := p.vars[name]; ok {
		return v, true
	}
	if len(name) == 1 && name[0] >= '1' && name[0] <= '9' {
		if i := int(name[0] - '1'); i < len(p.args) {
			return p.args[i], true
		}
		return "", false
	}
	v, ok := p.env[name]
	return v, ok
}

// nameLength returns the length of the parameter that s begins with.
func nameLength(s string) int {
	for i := range len(s) {
		c := s[i]
		digit := c >= '0' && c <= '9'
		if i == 0 && (digit || strings.IndexByte("#?!$-", c) >= 0) {
			return 1
		}
		if !digit && c != '_' && (c|0x20 < 'a' || c|0x20 > 'z') {
			return i
		}
	}
	return len(s)
}

// closing returns the length of s up to the bracket that closes its first bracket.
// Brackets in quotes do not count.
func closing(s string, open, shut byte) int {
	depth, quote := 0, byte(0)
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\\' && quote != '\'':
			i++
		case c == quote:
			quote = 0
		case quote != 0:
		case c == '"' || c == '\'':
			quote = c
		case c == open:
			depth++
		case c == shut:
			if depth--; depth == 0 {
				return i + 1
			}
		}
	}
	return len(s)
}

// redirect skips the source of input or the target of output.
func (p *shellParser) redirect() {
	rest := p.text[p.at:]
	document := strings.HasPrefix(rest, "<") && !strings.HasPrefix(rest, "<<") && p.text[p.at-1] == '<'
	rest = strings.TrimLeft(rest, "<>&|-")
	rest = strings.TrimLeft(rest, " \t")
	n := strings.IndexAny(rest, " \t\n;&|()")
	if n < 0 {
		n = len(rest)
	}
	p.at = len(p.text) - len(rest) + n
	if document && n > 0 && len(p.here) < maxCommands {
		p.here = append(p.here, strings.Trim(rest[:n], `'"\`))
	}
}

// skipHere skips the here-documents of the line that has just ended.
func (p *shellParser) skipHere() {
	for _, end := range p.here {
		for p.at < len(p.text) {
			line, _, _ := strings.Cut(p.text[p.at:], "\n")
			p.at = min(len(p.text), p.at+len(line)+1)
			if strings.TrimLeft(line, "\t") == end {
				break
			}
		}
	}
	p.here = nil
}

// keywords come before a command, or between commands.
var keywords = map[string]bool{
	"if": true, "then": true, "else": true, "elif": true, "fi": true, "while": true, "until": true, "do": true,
	"done": true, "{": true, "}": true, "!": true, "time": true, "esac": true,
}

// plain removes keywords and assignments from the beginning of a command, and records
// the assignments.
func (p *shellParser) plain(words []string) []string {
	for len(words) > 0 && keywords[words[0]] {
		words = words[1:]
	}
	if len(words) > 1 && (words[0] == "export" || words[0] == "readonly" || words[0] == "local" || words[0] == "declare") {
		words = words[1:]
	}
	for len(words) > 0 {
		name, value, ok := strings.Cut(words[0], "=")
		if !ok || name == "" || nameLength(name) != len(name) || name[0] >= '0' && name[0] <= '9' {
			break
		}
		p.vars[name] = value
		words = words[1:]
	}
	return words
}
