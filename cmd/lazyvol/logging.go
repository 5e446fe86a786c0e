package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// logFlags say what is logged, and how.
type logFlags struct {
	level  logLevel
	format logFormat
}

func (f *logFlags) register(flags *pflag.FlagSet) {
	flags.Var(&f.level, "log-level", "log what is at least of this `level`: debug, info, warn or error (default: warn, and info of a daemon)")
	f.format = logText
	flags.Var(&f.format, "log-format", "log as `text` or json, to stderr or into a daemon's log")
}

// logLevel is a flag: a level, or none.
type logLevel string

// Set implements pflag.Value.
func (l *logLevel) Set(s string) error {
	switch s {
	case "debug", "info", "warn", "error":
		*l = logLevel(s)
		return nil
	}
	return fmt.Errorf("%q is not debug, info, warn or error", s)
}

// String implements pflag.Value.
func (l *logLevel) String() string { return string(*l) }

// Type implements pflag.Value.
func (l *logLevel) Type() string { return "level" }

// logFormat is a flag.
type logFormat string

// The formats.
const (
	logText logFormat = "text"
	logJSON logFormat = "json"
)

// Set implements pflag.Value.
func (f *logFormat) Set(s string) error {
	if s != string(logText) && s != string(logJSON) {
		return fmt.Errorf("%q is not text or json", s)
	}
	*f = logFormat(s)
	return nil
}

// String implements pflag.Value.
func (f *logFormat) String() string { return string(*f) }

// Type implements pflag.Value.
func (f *logFormat) Type() string { return "format" }

// minimum is the lowest level that is logged: what the flags say, or else fallback.
func (a *app) minimum(fallback slog.Level) slog.Level {
	switch {
	case a.verbose:
		return slog.LevelDebug
	case a.logging.level == "":
		return fallback
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(a.logging.level)); err != nil {
		return fallback // its Set has refused what is none
	}
	return l
}

// logger returns a logger to w, which counts what is logged, says what it repeats
// once a minute, and leaves the time to the journal if w is one.
func (a *app) logger(w io.Writer, level slog.Level) *slog.Logger {
	journal := isJournal(w)
	if journal {
		w = &journalWriter{w: w}
	}
	o := &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, attr slog.Attr) slog.Attr {
		if journal && len(groups) == 0 && attr.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return attr
	}}
	var h slog.Handler = slog.NewTextHandler(w, o)
	if a.logging.format == logJSON {
		h = slog.NewJSONHandler(w, o)
	}
	return slog.New(newQuietHandler(h, &a.logged))
}

// isJournal reports whether w is the journal's stream: see JOURNAL_STREAM in
// systemd.exec(5).
func isJournal(w io.Writer) bool {
	if c, ok := w.(*console); ok {
		w = c.w
	}
	f, ok := w.(interface{ Fd() uintptr })
	stream := os.Getenv("JOURNAL_STREAM")
	if !ok || stream == "" {
		return false
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false
	}
	return stream == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// journalWriter puts before each line the priority by which the journal files it: see
// sd-daemon(3). Handlers write a record at a time, and without its time the level is
// what it begins with.
type journalWriter struct{ w io.Writer }

// Write implements [io.Writer].
func (j *journalWriter) Write(line []byte) (int, error) {
	priority := "<6>" // info
	for level, p := range map[string]string{"DEBUG": "<7>", "WARN": "<4>", "ERROR": "<3>"} {
		if bytes.HasPrefix(line, []byte("level="+level+" ")) || bytes.HasPrefix(line, []byte(`{"level":"`+level+`"`)) {
			priority = p
		}
	}
	if _, err := j.w.Write(append([]byte(priority), line...)); err != nil {
		return 0, err
	}
	return len(line), nil
}

// logCounts count what was logged, by level. The zero value is ready to use.
type logCounts struct{ warnings, errors atomic.Int64 }

// loggedLevels are those that are counted.
func loggedLevels() []slog.Level { return []slog.Level{slog.LevelWarn, slog.LevelError} }

func (c *logCounts) of(level slog.Level) *atomic.Int64 {
	if level >= slog.LevelError {
		return &c.errors
	}
	return &c.warnings
}

func (c *logCounts) add(level slog.Level) {
	if level >= slog.LevelWarn {
		c.of(level).Add(1)
	}
}

func (c *logCounts) count(level slog.Level) int64 { return c.of(level).Load() }
