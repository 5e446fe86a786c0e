package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// verify lists the problems found.
func (w *world) verify(id manifest.SnapshotID) (snapshot.Report, []error) {
	w.t.Helper()
	var problems []error
	report, err := w.reopen().Verify(w.ctx, id, func(err error) { problems = append(problems, err) })
	if err != nil {
		w.t.Fatal(err)
	}
	if int64(len(problems)) != report.Problems {
		w.t.Errorf("told of %d problems, and the report has %d", len(problems), report.Problems)
	}
	return report, problems
}

// Damage to any object of a snapshot is found and named, wherever it is.
func TestVerifyFindsAnyDamage(t *testing.T) { plainAndSealed(t, testVerifyFindsAnyDamage) }

func testVerifyFindsAnyDamage(t *testing.T, newWorld func(testing.TB) *world) {
	t.Parallel()
	base := newDevice(20*testBlock).random(1, span(0, 8)...).tiny(1, 15)
	second := base.random(2, 1, 2, 3)
	flip := func(data []byte) []byte {
		data = bytes.Clone(data)
		data[len(data)/2] ^= 1
		return data
	}
	flipFirst := func(data []byte) []byte {
		data = bytes.Clone(data)
		data[0] ^= 1
		return data
	}
	cut := func(data []byte) []byte { return data[:len(data)-1] }
	for _, damage := range []struct {
		name   string
		change func([]byte) []byte // nil removes the object
	}{{"flip", flip}, {"flip of the first byte", flipFirst}, {"cut", cut}, {"gone", nil}} {
		w := newWorld(t)
		one := w.create(nil, nil, base)
		two := w.create(one, base, second)
		if err := w.store.SetTags(w.ctx, two.ID(), map[string]string{"a": "b"}, nil); err != nil {
			t.Fatal(err)
		}
		for key := range w.objects("") {
			switch {
			case key == manifest.StoreKey(): // none of theirs
				continue
			case strings.HasPrefix(key, "meta/") && damage.change == nil: // no tags are fine
				continue
			case !strings.HasPrefix(key, "data/") && damage.name == "flip": // a record has no checksum
				continue
			case strings.HasPrefix(key, "outcomes/") && damage.change == nil: // pending, as far as anybody knows
				continue
			}
			t.Run(damage.name+" "+key, func(t *testing.T) {
				w := w.in(t)
				good, _, err := w.faults.Get(w.ctx, key, 64<<20)
				if err != nil {
					t.Fatal(err)
				}
				if damage.change == nil {
					err = w.faults.Delete(w.ctx, key)
				} else {
					w.overwrite(key, string(damage.change(good)))
				}
				if err != nil {
					t.Fatal(err)
				}
				_, first := w.verify(one.ID())
				_, second := w.verify(two.ID())
				if len(first)+len(second) == 0 {
					t.Error("nothing found")
				}
				w.overwrite(key, string(good))
				_, first = w.verify(one.ID())
				_, second = w.verify(two.ID())
				if problems := append(first, second...); len(problems) > 0 {
					t.Errorf("found in what was mended: %v", problems)
				}
			})
		}
	}
}

// A block that is damaged is named by its number, and the others are checked.
func TestVerifyNamesTheBlock(t *testing.T) { plainAndSealed(t, testVerifyNamesTheBlock) }

func testVerifyNamesTheBlock(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(20*testBlock).random(1, span(0, 20)...)
	img := w.create(nil, nil, d)
	w.damageBlock(img, 20, 7)
	report, problems := w.verify(img.ID())
	if report.Blocks != 19 || len(problems) != 1 || !strings.Contains(problems[0].Error(), "block 7:") || !errors.Is(problems[0], manifest.ErrCorrupt) {
		t.Errorf("%+v, %v", report, problems)
	}
}

// Snapshots that share blocks are verified by reading each block once, and a
// block that is bad is bad in all of them.
func TestCheckReadsSharedBlocksOnce(t *testing.T) { plainAndSealed(t, testCheckReadsSharedBlocksOnce) }

func testCheckReadsSharedBlocksOnce(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d1 := newDevice(40*testBlock).random(1, span(0, 40)...)
	d2 := d1.random(2, 3, 4)
	d3 := d2.random(3, 4, 5)
	one := w.create(nil, nil, d1)
	two := w.create(one, d1, d2)
	three := w.create(two, d2, d3)
	if report := w.check(1); report.Blocks != 44 || report.Bytes != 44*testBlock || report.Problems != 0 || len(report.Snapshots) != 3 {
		t.Errorf("%+v", report)
	}
	w.damageBlock(one, 40, 7)
	report := w.check(1)
	if report.Problems != 1 {
		t.Fatalf("%v", report.Findings)
	}
	want := []snapshot.Range{{Offset: 7 * testBlock, Length: testBlock}}
	harmed := make(map[manifest.SnapshotID][]snapshot.Range)
	for _, h := range report.Findings[0].Harm {
		harmed[h.Snapshot] = h.Ranges
	}
	for _, img := range []*snapshot.Image{one, two, three} {
		if diff := cmp.Diff(want, harmed[img.ID()]); diff != "" {
			t.Errorf("%s: %s", img.ID(), diff)
		}
	}
}

// check verifies the whole store.
func (w *world) check(share float64) *snapshot.Report {
	w.t.Helper()
	report, err := w.reopen().Check(w.ctx, snapshot.Check{Share: share, Seed: 1})
	if err != nil {
		w.t.Fatal(err)
	}
	return report
}

// What a delete and a reclaim remove meanwhile is no damage.
func TestVerifyOfASnapshotThatIsDeletedMeanwhile(t *testing.T) {
	plainAndSealed(t, testVerifyOfASnapshotThatIsDeletedMeanwhile)
}

func testVerifyOfASnapshotThatIsDeletedMeanwhile(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(20*testBlock).random(1, span(0, 20)...)
	img := w.create(nil, nil, d)
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpReadRange, Times: 1}, blockstoretest.Fault{
		Before: func(context.Context, blockstoretest.Call) {
			w.delete(img.ID())
			w.reclaim()
		},
	})
	_, err := w.store.Verify(w.ctx, img.ID(), func(err error) { t.Error(err) })
	if !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("verify: %v", err)
	}
}

// That the store cannot be asked is no verdict on the snapshot.
func TestVerifyWithoutAStoreIsNoVerdict(t *testing.T) {
	plainAndSealed(t, testVerifyWithoutAStoreIsNoVerdict)
}

func testVerifyWithoutAStoreIsNoVerdict(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	img := w.create(nil, nil, newDevice(20*testBlock).random(1, span(0, 20)...))
	for _, prefix := range []string{"packs/", "leaves/", "root", "intents/", "outcomes/", "data/"} {
		w.faults.Inject(blockstoretest.Rule{
			Match: func(c blockstoretest.Call) bool { return strings.Contains(c.Keys[0], prefix) },
		}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
		if _, err := w.store.Verify(w.ctx, img.ID(), func(err error) { t.Errorf("problem: %v", err) }); !errors.Is(err, blockstore.ErrUnavailable) {
			t.Errorf("%s: %v", prefix, err)
		}
		w.faults.Heal()
	}
}
