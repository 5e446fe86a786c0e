package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// quietLogger returns a logger that holds back repetitions, its output, and its clock.
func quietLogger(level slog.Level, counts *logCounts) (log *slog.Logger, out *bytes.Buffer, now *time.Time) {
	out, now = new(bytes.Buffer), new(time.Time)
	*now = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	h := newQuietHandler(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level}), counts)
	h.state.now = func() time.Time { return *now }
	return slog.New(h), out, now
}

func TestRepeatedErrorsAreLoggedOnceAMinute(t *testing.T) {
	var counts logCounts
	log, out, now := quietLogger(slog.LevelInfo, &counts)
	for range 1000 {
		log.Error("store is away", "error", errors.New("no route"))
		*now = now.Add(59 * time.Millisecond)
	}
	if n := strings.Count(out.String(), "\n"); n != 1 {
		t.Errorf("%d lines of 1000 within a minute:\n%s", n, out)
	}
	*now = now.Add(time.Minute)
	out.Reset()
	log.Error("store is away", "error", errors.New("no route"))
	if !strings.Contains(out.String(), "held_back=999") {
		t.Errorf("it does not tell how many were held back: %s", out)
	}
	out.Reset()
	log.With("volume", "b").Error("store is away", "error", errors.New("no route")) // another
	log.Warn("store is away", "error", errors.New("no route"))                      // another level
	log.Info("mounted")
	log.Info("mounted") // is no complaint
	if n := strings.Count(out.String(), "\n"); n != 4 {
		t.Errorf("%d lines, want 4:\n%s", n, out)
	}
	if counts.count(slog.LevelError) != 1002 || counts.count(slog.LevelWarn) != 1 {
		t.Errorf("counted %d errors and %d warnings, want those held back too", counts.count(slog.LevelError), counts.count(slog.LevelWarn))
	}
}

func TestAThousandBlocksSayLittleMoreThanTwenty(t *testing.T) {
	log, out, _ := quietLogger(slog.LevelWarn, new(logCounts))
	for block := range 1000 {
		log.Error("block is corrupt", "block", block)
	}
	if n := strings.Count(out.String(), "\n"); n != maxAlike {
		t.Errorf("%d lines, want %d", n, maxAlike)
	}
	out.Reset()
	log.Error("something else")
	if !strings.Contains(out.String(), "something else") {
		t.Error("one message silences another")
	}
}

func TestWhatIsRememberedOfALogIsBounded(t *testing.T) {
	log, _, _ := quietLogger(slog.LevelWarn, new(logCounts))
	for i := range 10 * maxKinds {
		log.Warn(fmt.Sprintf("message %d", i))
	}
	if n := len(log.Handler().(*quietHandler).state.kinds); n > maxKinds+1 {
		t.Errorf("%d kinds are remembered, at most %d are to be", n, maxKinds)
	}
}

func TestDebuggingHoldsNothingBack(t *testing.T) {
	log, out, _ := quietLogger(slog.LevelDebug, new(logCounts))
	for range 5 {
		log.Error("again")
	}
	if n := strings.Count(out.String(), "\n"); n != 5 {
		t.Errorf("%d lines, want 5", n)
	}
}

func TestLevelAndFormatAreAsAsked(t *testing.T) {
	for _, c := range []struct {
		flags    []string
		fallback slog.Level
		want     slog.Level
	}{
		{nil, slog.LevelWarn, slog.LevelWarn},
		{nil, slog.LevelInfo, slog.LevelInfo},
		{[]string{"-v"}, slog.LevelWarn, slog.LevelDebug},
		{[]string{"--log-level=error"}, slog.LevelInfo, slog.LevelError},
		{[]string{"--log-level=info"}, slog.LevelWarn, slog.LevelInfo},
		{[]string{"--log-level=error", "-v"}, slog.LevelWarn, slog.LevelDebug},
	} {
		a := &app{memory: defaultMemory, keys: newSecretKeys()}
		if err := a.command().PersistentFlags().Parse(c.flags); err != nil {
			t.Fatal(err)
		}
		if got := a.minimum(c.fallback); got != c.want {
			t.Errorf("%v: %v, want %v", c.flags, got, c.want)
		}
	}
	var out bytes.Buffer
	a := &app{logging: logFlags{format: logJSON}}
	a.logger(&out, slog.LevelInfo).Info("mounted", "id", "vol-1")
	var line struct{ Level, Msg, ID, Time string }
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || line.Level != "INFO" || line.Msg != "mounted" || line.ID != "vol-1" || line.Time == "" {
		t.Errorf("%v: %s", err, &out)
	}
}

// The journal has the time and the priority of each line; everybody else is told the
// time.
func TestTheJournalIsToldPrioritiesAndNoTime(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	speak := func(stream string, format logFormat) string {
		t.Helper()
		t.Setenv("JOURNAL_STREAM", stream)
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Seek(0, 0); err != nil {
			t.Fatal(err)
		}
		a := &app{logging: logFlags{format: format}}
		log := a.logger(newConsole(f), slog.LevelDebug)
		log.Error("e")
		log.Warn("w", "quoted", "level=ERROR ")
		log.Info("i")
		log.Debug("d")
		text, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	ours := fmt.Sprintf("%d:%d", st.Dev, st.Ino)
	for _, format := range []logFormat{logText, logJSON} {
		text := speak(ours, format)
		var priorities []string
		for line := range strings.Lines(text) {
			priorities = append(priorities, line[:3])
		}
		if got := strings.Join(priorities, " "); got != "<3> <4> <6> <7>" || strings.Contains(text, "time") {
			t.Errorf("%s: %s", format, text)
		}
		if text := speak(fmt.Sprintf("%d:%d", st.Dev, st.Ino+1), format); strings.Contains(text, "<3>") || !strings.Contains(text, "time") {
			t.Errorf("another's stream was taken for ours: %s", text)
		}
	}
}

// A log takes no more than twice its limit, whoever writes it, and what was said last
// is always there.
func TestADaemonsLogIsBounded(t *testing.T) {
	dir := t.TempDir()
	stderr, err := os.Create(filepath.Join(dir, "stderr")) // the descriptor is the log's from open on
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	l := &logFile{fd: int(stderr.Fd()), limit: 1000}
	if _, err := l.Write([]byte("before it is ready\n")); err != nil {
		t.Fatal(err)
	}
	if err := l.open(filepath.Join(dir, "d")); err != nil {
		t.Fatal(err)
	}
	length := func(name string) int64 {
		info, err := os.Stat(filepath.Join(dir, "d", name))
		if errors.Is(err, os.ErrNotExist) {
			return 0
		}
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	for i := range 200 {
		if i%10 == 0 { // as a panic would, past us
			if _, err := fmt.Fprintf(stderr, "panic %d\n", i); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := fmt.Fprintf(l, "message number %d, of some length\n", i); err != nil {
			t.Fatal(err)
		}
		if now, old := length(logName), length(oldLogName); now > 1000 || old > 1010 {
			t.Fatalf("after %d messages: %d and %d bytes", i, now, old)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "d", logName))
	if err != nil || !strings.HasSuffix(string(text), "message number 199, of some length\n") {
		t.Errorf("%v: the last message is not there:\n%s", err, text)
	}
	old, err := os.ReadFile(filepath.Join(dir, "d", oldLogName))
	if err != nil || !strings.Contains(string(old)+string(text), "panic 190\n") {
		t.Errorf("%v: what others write is not there", err)
	}
	before, err := os.ReadFile(stderr.Name())
	if err != nil || string(before) != "before it is ready\n" {
		t.Errorf("%v: what was said before is %q", err, before)
	}

	// One that was left too long is moved away when it is opened.
	if err := os.WriteFile(filepath.Join(dir, "d", logName), make([]byte, 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.open(filepath.Join(dir, "d")); err != nil {
		t.Fatal(err)
	}
	if now, old := length(logName), length(oldLogName); now != 0 || old != 5000 {
		t.Errorf("opened with %d bytes, %d moved away", now, old)
	}
}

// A log that cannot be moved away goes on, and says why.
func TestALogThatCannotBeMovedGoesOn(t *testing.T) {
	dir := t.TempDir()
	stderr, err := os.Create(filepath.Join(dir, "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	l := &logFile{fd: int(stderr.Fd()), limit: 1000}
	if err := l.open(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, oldLogName, "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		if _, err := fmt.Fprintf(l, "message number %d, of thirty bytes\n", i); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, logName))
	if err != nil || strings.Count(string(text), "message number") != 100 || !strings.Contains(string(text), "move the log away") {
		t.Errorf("%v:\n%s", err, text)
	}
	if n := strings.Count(string(text), "warning"); n < 1 || n > 10 {
		t.Errorf("it complained %d times:\n%s", n, text)
	}
}
