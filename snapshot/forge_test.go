package snapshot_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// forge changes the only leaf and the only section of a snapshot, and every
// hash above them: what a bug, or somebody who may write to the store, can do.
func (w *world) forge(img *snapshot.Image, change func(*manifest.Leaf, *manifest.Section) error) {
	w.t.Helper()
	key := manifest.LeavesKey(img.ID(), 0)
	part, _, err := w.faults.Get(w.ctx, key, blockstore.MaxObjectSize)
	if err != nil {
		w.t.Fatal(err)
	}
	root, outcome := *img.Root, img.Outcome
	leafRef, sectionRef := root.Leaves[0], root.Sections[0]
	section, err := manifest.DecodeSection(part[sectionRef.Offset:])
	if err != nil {
		w.t.Fatal(err)
	}
	leaf, err := manifest.DecodeLeaf(part[:sectionRef.Offset])
	if err != nil {
		w.t.Fatal(err)
	}
	if err := change(leaf, section); err != nil {
		w.t.Fatal(err)
	}
	encoded := append(leaf.Encode(), section.Encode()...)
	leafRef.Hash = leaf.Hash()
	sectionRef.Length, sectionRef.Hash = uint32(len(section.Encode())), section.Hash()
	root.DataBlocks = int64(leaf.DataBlocks())
	root.Leaves, root.Sections = []manifest.LeafRef{leafRef}, []manifest.SectionRef{sectionRef}

	grew := int64(len(encoded) - len(part))
	outcome.LeavesLength += grew
	outcome.StoredBytes += grew
	outcome.DataBlocks, outcome.UploadedBlocks = root.DataBlocks, root.DataBlocks
	outcome.Root, outcome.RootHash = root.Encode(), manifest.HexHash(root.Hash())
	w.overwrite(key, string(encoded))
	w.overwrite(manifest.RootKey(img.ID()), string(outcome.Root))
	w.put(manifest.OutcomeKey(img.ID()), outcome)
}

// An index whose hashes are right and which contradicts itself is found out: a
// footer that lists too little would make reclaim remove what is live.
func TestVerifyFindsAnIndexThatContradictsItself(t *testing.T) {
	d := newDevice(testBlock*30).tiny(1, span(0, 20)...)
	for name, c := range map[string]struct {
		change func(l *manifest.Leaf, s *manifest.Section) error
		says   []string // a part of each problem
	}{
		"nothing": {func(*manifest.Leaf, *manifest.Section) error { return nil }, nil},
		"a slot too few in the footer": {
			func(_ *manifest.Leaf, s *manifest.Section) error { return s.Remove(0, 7) },
			[]string{"refer to 1 slots of pack 0"},
		},
		"a slot too many in the footer": {
			func(_ *manifest.Leaf, s *manifest.Section) error { return s.Add(0, 100, 5) },
			[]string{"lists 1 slots of pack 0"},
		},
		"a pack too many in the footer": {
			func(_ *manifest.Leaf, s *manifest.Section) error { return s.Add(9, 0, 5) },
			[]string{"lists 1 slots of pack 9"},
		},
		"the footer of another owner": {
			func(_ *manifest.Leaf, s *manifest.Section) error {
				other := manifest.NewSection(s.Owner()^1|2, 0)
				defer func() { *s = *other }()
				return other.Add(0, 0, 5)
			},
			[]string{"it is section 0 of owner"},
		},
		"a block too few in the leaf": {
			func(l *manifest.Leaf, _ *manifest.Section) error {
				l.Set(3, manifest.Ref{})
				return nil
			},
			[]string{"no leaf refers to"},
		},
		"one slot for two blocks": {
			func(l *manifest.Leaf, _ *manifest.Section) error {
				l.Set(25, l.Ref(3))
				return nil
			},
			[]string{"is not as the leaf says", "another block, too"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			img := w.create(nil, nil, d)
			w.forge(img, c.change)
			_, problems := w.verify(img.ID())
			if len(problems) != len(c.says) {
				t.Errorf("found %v", problems)
				return
			}
			for i, err := range problems {
				if !strings.Contains(err.Error(), c.says[i]) {
					t.Errorf("found %v, not %q", err, c.says[i])
				}
			}
		})
	}
}

// What cannot be read is reported once, and nothing that would follow from it.
func TestVerifyReportsOnlyTheCause(t *testing.T) {
	d := newDevice(2*leafBytes).tiny(1, span(0, 20)...).tiny(1, 1500)
	for name, where := range map[string]func(r *manifest.Root) int64{
		"a leaf":    func(r *manifest.Root) int64 { return r.Leaves[1].Offset + 100 },
		"a section": func(r *manifest.Root) int64 { return r.Sections[0].Offset + 30 },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			img := w.create(nil, nil, d)
			key := manifest.LeavesKey(img.ID(), 0)
			part, _, err := w.faults.Get(w.ctx, key, blockstore.MaxObjectSize)
			if err != nil {
				t.Fatal(err)
			}
			part[where(img.Root)] ^= 1
			w.overwrite(key, string(part))
			if _, problems := w.verify(img.ID()); len(problems) != 1 {
				t.Errorf("found %v", problems)
			}
		})
	}
}

// Records and roots that are another snapshot's are not believed.
func TestRecordsOfAnotherSnapshot(t *testing.T) {
	w := newWorld(t)
	one := w.create(nil, nil, newDevice(testBlock).tiny(1, 0))
	two := w.create(nil, nil, newDevice(testBlock).tiny(2, 0))

	forged := one.Outcome
	forged.Root, forged.RootHash = two.Outcome.Root, two.Outcome.RootHash
	w.put(manifest.OutcomeKey(one.ID()), forged)
	if _, err := w.store.Open(w.ctx, one.ID(), snapshot.Holder{}); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("open with another's root: %v", err)
	}
	w.put(manifest.OutcomeKey(one.ID()), two.Outcome)
	if _, err := w.store.Open(w.ctx, one.ID(), snapshot.Holder{}); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("open with another's outcome: %v", err)
	}
	if _, err := w.store.Describe(w.ctx, one.ID()); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("describe with another's outcome: %v", err)
	}
	d := newDevice(testBlock)
	a, b := w.begin(w.plan(nil, d), nil, d), w.begin(w.plan(nil, d), nil, d)
	intent, _, err := w.faults.Get(w.ctx, manifest.IntentKey(b.ID()), blockstore.MaxObjectSize)
	if err != nil {
		t.Fatal(err)
	}
	w.overwrite(manifest.IntentKey(a.ID()), string(intent))
	if _, err := w.store.Describe(w.ctx, a.ID()); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("describe with another's intent: %v", err)
	}
}

// An outcome that another nonce committed is not this attempt's.
func TestOutcomeOfAnotherNonce(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	plan := w.plan(nil, d)
	a := w.begin(plan, nil, d)
	other := w.create(nil, nil, d).Outcome
	other.Snapshot = a.ID()
	w.put(manifest.OutcomeKey(a.ID()), other)
	if _, err := a.Commit(w.ctx); !errors.Is(err, snapshot.ErrAborted) {
		t.Errorf("commit: %v", err)
	}
	w.overwrite(manifest.IntentKey(a.ID()), "{")
	if committed, _, err := w.store.Resolve(w.ctx, a.ID(), plan.Nonce, "test"); committed || err != nil {
		t.Errorf("resolve: %v, %v", committed, err)
	}
	if err := w.store.Discard(w.ctx, a.ID(), snapshot.Holder{}); err != nil {
		t.Error(err)
	}
	if len(w.objects(manifest.DataPrefix(a.ID()))) == 0 {
		t.Error("discarded what another one committed")
	}
}
