package main

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"
)

const (
	// A warning or error that says the same as one before, in all but its time, is held
	// back for quietTime.
	quietTime = time.Minute

	// No more than maxAlike of one message, whatever its attributes, are logged in
	// quietTime: a thousand blocks that cannot be had say little more than twenty.
	maxAlike = 20

	// maxKinds bounds what is remembered of what was logged.
	maxKinds = 512
)

// A quietHandler holds back warnings and errors that are repeated, and says how many
// they were with the next that is not. It counts all. Debugging shows everything.
type quietHandler struct {
	next   slog.Handler
	prefix string // the attributes and groups that With gave
	state  *repetitions
}

// repetitions are what handlers of one logger know.
type repetitions struct {
	now    func() time.Time
	counts *logCounts

	mu    sync.Mutex // guards kinds
	kinds map[string]*repetition
}

type repetition struct {
	began  time.Time // of the quietTime that runs
	logged int       // in it
	held   int       // since one was logged
}

func newQuietHandler(next slog.Handler, counts *logCounts) *quietHandler {
	return &quietHandler{next: next, state: &repetitions{now: time.Now, counts: counts, kinds: make(map[string]*repetition)}}
}

// Enabled implements [slog.Handler].
func (h *quietHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

// Handle implements [slog.Handler].
func (h *quietHandler) Handle(ctx context.Context, r slog.Record) error {
	h.state.counts.add(r.Level)
	if r.Level < slog.LevelWarn || h.next.Enabled(ctx, slog.LevelDebug) {
		return h.next.Handle(ctx, r)
	}
	held, speak := h.state.due(r.Level.String()+" "+r.Message, h.prefix+attributes(r))
	if !speak {
		return nil
	}
	if held > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("held_back", held))
	}
	return h.next.Handle(ctx, r)
}

// attributes spells a record's.
func attributes(r slog.Record) string {
	var b strings.Builder
	r.Attrs(func(a slog.Attr) bool {
		b.WriteString(a.String())
		b.WriteByte(' ')
		return true
	})
	return b.String()
}

// due reports whether a message with its attributes is to be logged now, and how many
// like it were held back since one was.
func (s *repetitions) due(message, attrs string) (held int, speak bool) {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	alike := s.kind(message, now)
	if alike.logged >= maxAlike {
		alike.held++
		return 0, false
	}
	same := s.kind(message+"\x00"+attrs, now)
	if same.logged > 0 {
		alike.held++
		return 0, false
	}
	held, alike.held = alike.held, 0
	same.logged++
	alike.logged++
	return held, true
}

// kind returns what is known of a kind of message. mu is held.
func (s *repetitions) kind(key string, now time.Time) *repetition {
	k := s.kinds[key]
	if k == nil {
		if len(s.kinds) >= maxKinds {
			s.forget(now)
		}
		k = &repetition{began: now}
		s.kinds[key] = k
	}
	if now.Sub(k.began) >= quietTime {
		k.began, k.logged = now, 0
	}
	return k
}

// forget makes room: what is over goes first, and else everything. mu is held.
func (s *repetitions) forget(now time.Time) {
	for key, k := range s.kinds {
		if now.Sub(k.began) >= quietTime && k.held == 0 {
			delete(s.kinds, key)
		}
	}
	if len(s.kinds) >= maxKinds {
		clear(s.kinds)
	}
}

// WithAttrs implements [slog.Handler].
func (h *quietHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	prefix := h.prefix
	for _, a := range attrs {
		prefix += a.String() + " "
	}
	return &quietHandler{h.next.WithAttrs(attrs), prefix, h.state}
}

// WithGroup implements [slog.Handler].
func (h *quietHandler) WithGroup(name string) slog.Handler {
	return &quietHandler{h.next.WithGroup(name), h.prefix + name + ".", h.state}
}
