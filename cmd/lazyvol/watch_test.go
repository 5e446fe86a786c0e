package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// testSample is some volumes and mounts in different states.
func testSample() sample {
	eta := func(seconds int64) *int64 { return &seconds }
	at := time.Date(2026, 11, 23, 12, 3, 7, 0, time.Local)
	return sample{at: at, rows: []row{
		{reading: reading{statusJSON: statusJSON{
			ID: "vol-0123456789abcdef0", State: "hydrating", Size: 4 << 30, TotalBytes: 3 << 30, HydratedBytes: 5 << 28, DirtyBytes: 128 << 20, Rate: 45 << 20,
			ETASeconds: eta(80), Mountpoint: "/mnt/data", PID: 1, DemandWaits: 12, DemandLatencyMs: percentiles{35, 1234},
		}}, dirtyRate: 1.2 * (1 << 20), waitRate: 12.34, waitShare: 0.34},
		{reading: reading{statusJSON: statusJSON{
			ID: "vol-123456789abcdef01", State: "waiting-for-store", Size: 1 << 40, TotalBytes: 100 << 30, HydratedBytes: 99 << 30, Mountpoint: "/run/vm/a-rather-long-name/of-a-machine/disk0", PID: 2,
			DemandWaits: 3, DemandLatencyMs: percentiles{0.71, 12},
			Errors: []string{"2026-11-23T11:03:00Z an old one", at.Format(time.RFC3339) + " fetch block 12: the store does not answer: dial tcp 10.0.0.1:9000: connect: connection refused"},
		}}},
		{reading: reading{statusJSON: statusJSON{ID: "vol-23456789abcdef012", State: "hydrated", Size: 1 << 30, PID: 3, Mountpoint: "/blank", DirtyBytes: 5 << 20}}},
		{reading: reading{statusJSON: statusJSON{ID: "vol-3456789abcdef0123", State: "paused", Size: 1 << 30, TotalBytes: 1 << 30, HydratedBytes: 1 << 29}}},
		{reading: reading{silent: true, statusJSON: statusJSON{
			ID: "snap-1a2b3c4d567890abc", State: silentState, Size: 1 << 30, TotalBytes: 1 << 30, HydratedBytes: 1 << 30, Mountpoint: "/mnt/old", PID: 4, Errors: []string{"no answer for 7s"},
		}}},
	}}
}

const note = "every 1s, q ends"

func TestWatchScreens(t *testing.T) {
	all := testSample()
	one := sample{at: all.at, rows: all.rows[:1]}
	odd := sample{at: all.at, failed: []error{errors.New("volume.json\x1b[2J is damaged")}}
	for _, c := range []struct {
		name          string
		sample        sample
		width, height int
	}{
		{"all-79x24", all, 79, 24}, {"all-79x40", all, 79, 40}, {"all-39x10", all, 39, 10}, {"all-39x40", all, 39, 40}, {"all-119x8", all, 119, 8},
		{"one-79x24", one, 79, 24}, {"one-39x10", one, 39, 10}, {"odd-79x24", odd, 79, 24},
	} {
		got := renderWatch(c.sample, note, c.width, c.height, false)
		golden(t, filepath.Join("testdata", "watch", c.name+".txt"), got+"\n")
	}
	golden(t, filepath.Join("testdata", "watch", "coloured.txt"), renderWatch(one, note, 79, 24, true)+"\n")
	golden(t, filepath.Join("testdata", "watch", "lines.txt"), renderLines(all)+renderLines(odd))
}

// golden compares with a file, which LAZYVOL_GOLDEN=write writes anew, to be looked at.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if os.Getenv("LAZYVOL_GOLDEN") == "write" {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

// drawRow draws a row in whatever state.
func drawRow(t *rapid.T, i int) row {
	total := rapid.Int64Range(0, 1<<45).Draw(t, "total")
	r := row{reading: reading{statusJSON: statusJSON{
		ID: fmt.Sprintf("vol-%017x", i), Size: rapid.Int64Range(0, 1<<45).Draw(t, "size"), TotalBytes: total, HydratedBytes: rapid.Int64Range(0, total).Draw(t, "hydrated"),
		State:      rapid.SampledFrom([]string{"hydrating", "hydrated", "paused", "cache-full", "waiting-for-store", "odd\x1b[2J"}).Draw(t, "state"),
		DirtyBytes: rapid.Int64Range(0, 1<<45).Draw(t, "dirty"), Rate: rapid.Int64Range(0, 1<<35).Draw(t, "rate"), PID: rapid.IntRange(0, 1).Draw(t, "pid"),
		Mountpoint: rapid.StringN(0, 60, -1).Draw(t, "mountpoint"), Errors: rapid.SliceOfN(rapid.StringN(1, 100, -1), 0, 3).Draw(t, "errors"),
		DemandWaits: rapid.Int64Range(0, 1<<40).Draw(t, "waits"), DemandLatencyMs: percentiles{rapid.Float64Range(0, 1e6).Draw(t, "p50"), 60000},
	}}, dirtyRate: rapid.Float64Range(0, 1e10).Draw(t, "dirtyRate"), waitShare: rapid.Float64Range(0, 1).Draw(t, "share")}
	if eta := rapid.Int64Range(-1, 1<<40).Draw(t, "eta"); eta >= 0 {
		r.ETASeconds = &eta
	}
	r.silent = rapid.Bool().Draw(t, "silent")
	return r
}

// No picture is wider or higher than the terminal, and none has a control character in
// it, whatever names and messages hold.
func TestWatchScreensFit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := sample{at: time.Now()}
		for i := range rapid.IntRange(0, 12).Draw(t, "rows") {
			s.rows = append(s.rows, drawRow(t, i))
		}
		for range rapid.IntRange(0, 2).Draw(t, "failed") {
			s.failed = append(s.failed, errors.New(rapid.String().Draw(t, "error")))
		}
		width, height := rapid.IntRange(0, 130).Draw(t, "width"), rapid.IntRange(1, 60).Draw(t, "height")
		lines := strings.Split(renderWatch(s, note, width, height, false), "\n")
		if len(lines) > height {
			t.Fatalf("%d lines in %d", len(lines), height)
		}
		for _, line := range lines {
			if utf8.RuneCountInString(line) > width {
				t.Fatalf("%q has more than %d columns", line, width)
			}
			if line != oneLine(line) {
				t.Fatalf("%q has a control character", line)
			}
		}
	})
}

// However many there are, those that do not answer or have errors are seen first, and
// how many are not seen is told.
func TestWatchShowsTheMostInterestingFirst(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s sample
		n := rapid.IntRange(15, 40).Draw(t, "rows")
		for i := range n {
			s.rows = append(s.rows, drawRow(t, i))
		}
		height := rapid.IntRange(9, 14).Draw(t, "height")
		picture := renderWatch(s, note, 79, height, false)
		var shown []int
		for line := range strings.SplitSeq(picture, "\n") {
			for i := range s.rows {
				if strings.HasPrefix(strings.TrimLeft(line, "!* "), s.rows[i].ID) {
					shown = append(shown, i)
				}
			}
		}
		if len(shown) == 0 || !strings.Contains(picture, fmt.Sprintf("… and %d more", n-len(shown))) {
			t.Fatalf("of %d rows %d are shown:\n%s", n, len(shown), picture)
		}
		seen, last := make(map[int]bool), 0
		for _, i := range shown {
			seen[i] = true
			if s.rows[i].interest() < last {
				t.Fatalf("%s is out of order:\n%s", s.rows[i].ID, picture)
			}
			last = s.rows[i].interest()
		}
		for i := range s.rows {
			if !seen[i] && s.rows[i].interest() < last {
				t.Fatalf("%s is not shown:\n%s", s.rows[i].ID, picture)
			}
		}
	})
}

// fakeSubjects are subjects that answer as ask says.
func fakeSampler(ids []string, ask func(ctx context.Context, id string, known bool) reading) *sampler {
	var subjects []subject
	for _, id := range ids {
		subjects = append(subjects, subject{id: id, dir: "/" + id, volume: true})
	}
	s := (&app{}).newSampler(func() ([]subject, []error, error) { return subjects, nil, nil })
	s.ask = func(ctx context.Context, s subject, known *statusJSON) reading {
		if known != nil {
			ask(ctx, s.id, true)
			return reading{statusJSON: *known}
		}
		return ask(ctx, s.id, false)
	}
	return s
}

func TestSilentDaemonHoldsUpNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hung atomic.Bool
		var answers atomic.Int64 // of b
		s := fakeSampler([]string{"a", "b"}, func(ctx context.Context, id string, _ bool) reading {
			if id == "a" && hung.Load() {
				<-ctx.Done()
				return reading{silent: true, statusJSON: statusJSON{ID: id, Errors: []string{ctx.Err().Error()}}}
			}
			dirty := int64(0)
			if id == "b" {
				dirty = answers.Add(1) << 20
			}
			return reading{statusJSON: statusJSON{ID: id, State: "hydrated", PID: 1, Size: 77, DirtyBytes: dirty}}
		})
		ctx, cancel := context.WithCancel(t.Context())
		take := func() sample {
			t.Helper()
			start := time.Now()
			got, err := s.sample(ctx, framePatience)
			if err != nil || time.Since(start) > framePatience || len(got.rows) != 2 || got.rows[0].ID != "a" || got.rows[1].ID != "b" {
				t.Fatalf("after %v: %+v, %v", time.Since(start), got.rows, err)
			}
			return got
		}
		take()
		time.Sleep(framePatience)
		hung.Store(true)
		before := answers.Load()
		for i := range 5 {
			time.Sleep(time.Second - framePatience)
			r := take().rows
			late := time.Duration(i)*time.Second+framePatience >= answerPatience
			if r[0].silent != late || r[0].Size != 77 || (r[0].State == silentState) != late || (len(r[0].Errors) == 1) != late {
				t.Errorf("frame %d: it is %+v", i, r[0].reading)
			}
			if r[1].silent || r[1].DirtyBytes != (before+int64(i)+1)<<20 || i > 1 && r[1].dirtyRate != 1<<20 {
				t.Errorf("frame %d: the other is %+v, which grows by %v", i, r[1].reading, r[1].dirtyRate)
			}
		}
		cancel()
		s.close()
		hung.Store(false)
		ctx, cancel = context.WithCancel(t.Context())
		if r := take().rows[0]; r.silent || r.State != "hydrated" {
			t.Errorf("when it answers again: %+v", r)
		}
		cancel()
		s.close()
	})
}

// What gave up waiting for a daemon knows nothing of it: what it said before stays.
func TestSilentDaemonIsShownAsItWas(t *testing.T) {
	hung := false
	s := fakeSampler([]string{"a"}, func(_ context.Context, id string, _ bool) reading {
		if hung {
			return reading{silent: true, statusJSON: statusJSON{ID: id, State: silentState, Errors: []string{"gave up"}}}
		}
		return reading{statusJSON: statusJSON{ID: id, State: "hydrated", PID: 1, Size: 77, Errors: []string{"an old one"}}}
	})
	for _, hung = range []bool{false, true, true} {
		got, err := s.sample(t.Context(), time.Minute)
		if err != nil || len(got.rows) != 1 {
			t.Fatalf("%+v, %v", got, err)
		}
		if r := got.rows[0]; r.silent != hung || r.Size != 77 || hung && (r.State != silentState || !cmp.Equal(r.Errors, []string{"gave up"})) {
			t.Errorf("hung %t: %+v", hung, r.reading)
		}
	}
	s.close()
}

// A look into a volume that is not mounted locks it: there is one in a while.
func TestVolumesThatAreNotMountedAreLookedIntoRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var looks, asked int
		pid := 0
		s := fakeSampler([]string{"a"}, func(_ context.Context, id string, known bool) reading {
			asked++
			if !known {
				looks++
			}
			return reading{statusJSON: statusJSON{ID: id, PID: pid}}
		})
		for range 40 {
			if _, err := s.sample(t.Context(), time.Second); err != nil {
				t.Fatal(err)
			}
			time.Sleep(unmountedPause / 10)
		}
		if asked != 40 || looks != 4 {
			t.Errorf("asked %d times, and looked into it %d times", asked, looks)
		}
		s.close()
	})
}
