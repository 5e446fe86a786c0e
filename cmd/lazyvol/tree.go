package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotTreeCommand() *cobra.Command {
	var all, unique, asJSON bool
	c := &cobra.Command{
		Use: "tree", Short: "Show which snapshot was made from which", Args: args(cobra.NoArgs),
		Long: `Shows the snapshots of each lineage as a tree, oldest first: each below the one it was
made from, an only child straight below it, after an arrow. One whose parent is not
listed, having been deleted, hangs from the nearest ancestor that is, as far as the
recycle bin tells, else from the lineage, and says so.

A line tells when the snapshot was begun, the size of the device, what the snapshot
stored, and its Name tag or description. --unique adds what deleting it, and no
other, would free: that takes many requests for each.

Snapshots whose records are damaged are left out and named, and the exit code is 1.`,
		Example: `  lazyvol snapshot tree --unique`,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx := c.Context()
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			found, damaged := store.List(ctx, all)
			if found == nil {
				return damaged
			}
			binned, damagedInBin := parentsInBin(ctx, store, found)
			if binned == nil {
				return damagedInBin
			}
			if len(found) == 0 && damaged == nil && !asJSON {
				a.note("no snapshot in %s", store)
			}
			trees := growTrees(found, binned)
			var frees map[manifest.SnapshotID]freed
			if unique {
				if frees, err = a.freed(ctx, store, found); err != nil {
					return err
				}
			}
			if asJSON {
				return errors.Join(printJSON(a.stdout, describeTrees(trees, frees)), damaged, damagedInBin)
			}
			return errors.Join(drawTrees(a.stdout, trees, frees), damaged, damagedInBin)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "show aborted ones too")
	c.Flags().BoolVar(&unique, "unique", false, "show what deleting each would free")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON: each lineage's snapshots in the order of the tree, with that which they are Below")
	return c
}

// parentsInBin returns the parents of the snapshots in the recycle bin. It reads
// the bin only if a parent is missing; nil is an error. Those whose records are
// damaged are left out and named by the error.
func parentsInBin(ctx context.Context, store *snapshot.Store, found []snapshot.Description) (map[manifest.SnapshotID]manifest.SnapshotID, error) {
	parents := make(map[manifest.SnapshotID]manifest.SnapshotID)
	listed := make(map[manifest.SnapshotID]bool, len(found))
	for _, d := range found {
		listed[d.ID] = true
	}
	missing := false
	for _, d := range found {
		missing = missing || !d.Parent.IsZero() && !listed[d.Parent]
	}
	if !missing {
		return parents, nil
	}
	bin, err := store.ListBin(ctx)
	if bin == nil && err != nil {
		return nil, err
	}
	for _, d := range bin {
		parents[d.ID] = d.Parent
	}
	return parents, err
}

// freed is what deleting a snapshot would free.
type freed struct {
	bytes   int64
	unknown string // why it is not known, for people; "": it is
}

func (f freed) String() string { return cmp.Or(f.unknown, "frees "+size(f.bytes)) }

// freed returns what deleting each completed snapshot would free. For each all others
// of its lineage are read: who waits sees a bar, of the bytes stored.
func (a *app) freed(ctx context.Context, store *snapshot.Store, found []snapshot.Description) (map[manifest.SnapshotID]freed, error) {
	frees := make(map[manifest.SnapshotID]freed, len(found))
	var stored int64
	for _, d := range found {
		stored += d.Outcome.StoredBytes
	}
	bar := a.newProgress("", stored)
	defer bar.end()
	for _, d := range found {
		if d.State != snapshot.Completed {
			continue
		}
		n, err := store.UniqueBytes(ctx, d.ID)
		switch {
		case errors.Is(err, snapshot.ErrNoKey), errors.Is(err, blockstore.ErrDenied): // as in snapshot show
			a.log().Warn("what deleting it would free is not known", "snapshot", d.ID, "error", err)
			frees[d.ID] = freed{unknown: "frees ?"}
		case errors.Is(err, snapshot.ErrNotFound): // deleted since it was listed
			frees[d.ID] = freed{unknown: "deleted"}
		case err != nil:
			return nil, err
		default:
			frees[d.ID] = freed{bytes: n}
		}
		bar.add(d.Outcome.StoredBytes)
	}
	bar.finish()
	return frees, nil
}

// A lineageTree is the snapshots of a lineage.
type lineageTree struct {
	id         manifest.LineageID
	encryption *manifest.Encryption // nil: none
	roots      []*treeNode
}

// A treeNode is a snapshot below its nearest listed ancestor.
type treeNode struct {
	snapshot.Description
	parent   *treeNode // nil: it hangs from the lineage
	children []*treeNode
}

// growTrees puts snapshots below those they were made from, in the order in which
// they are given. Binned has the parents of snapshots that are not among them. No
// snapshot is left out, whatever the records say.
func growTrees(found []snapshot.Description, binned map[manifest.SnapshotID]manifest.SnapshotID) []*lineageTree {
	nodes := make([]*treeNode, len(found))
	byID := make(map[manifest.SnapshotID]*treeNode, len(found))
	for i, d := range found {
		nodes[i] = &treeNode{Description: d}
		byID[d.ID] = nodes[i]
	}
	for _, n := range nodes {
		id := n.Parent
		for range len(binned) { // at most, should they go in a circle
			if byID[id] != nil || id.IsZero() {
				break
			}
			id = binned[id]
		}
		if p := byID[id]; p != nil && id.Lineage == n.ID.Lineage {
			n.parent = p
		}
	}
	cutCircles(nodes)
	var trees []*lineageTree
	byLineage := make(map[manifest.LineageID]*lineageTree)
	for _, n := range nodes {
		t := byLineage[n.ID.Lineage]
		if t == nil {
			t = &lineageTree{id: n.ID.Lineage, encryption: n.Encryption}
			byLineage[t.id] = t
			trees = append(trees, t)
		}
		if n.parent == nil {
			t.roots = append(t.roots, n)
		} else {
			n.parent.children = append(n.parent.children, n)
		}
	}
	return trees
}

// cutCircles makes roots of as many nodes as it takes for each to have one above
// it: only records that were tampered with are in circles.
func cutCircles(nodes []*treeNode) {
	walk := make(map[*treeNode]*treeNode, len(nodes)) // where the walk began that came by
	for _, start := range nodes {
		for n := start; n != nil && walk[n] == nil; n = n.parent {
			walk[n] = start
			if n.parent != nil && walk[n.parent] == start {
				n.parent = nil
			}
		}
	}
}

// drawTrees draws each lineage below a line of its own. Frees, unless it is nil,
// has what to say of what deleting each snapshot frees.
func drawTrees(out io.Writer, trees []*lineageTree, frees map[manifest.SnapshotID]freed) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	for _, t := range trees {
		encrypted := "not encrypted"
		switch {
		case t.encryption != nil && t.encryption.Shredded:
			encrypted = "encrypted, its data key destroyed"
		case t.encryption != nil:
			encrypted = "encrypted"
		}
		fmt.Fprintf(w, "lineage %s, %s\n", t.id, encrypted)
		drawSiblings(w, t.roots, "", frees)
	}
	return w.Flush()
}

// drawSiblings draws snapshots with all below them. Generations of only children
// stay in one column: a hundred are no line that nobody can read.
func drawSiblings(w io.Writer, siblings []*treeNode, indent string, frees map[manifest.SnapshotID]freed) {
	for i, n := range siblings {
		branch, below := "├─ ", "│  "
		if i == len(siblings)-1 {
			branch, below = "└─ ", "   "
		}
		drawNode(w, n, indent+branch, frees)
		for len(n.children) == 1 {
			n = n.children[0]
			drawNode(w, n, indent+below+"↓ ", frees)
		}
		drawSiblings(w, n.children, indent+below, frees)
	}
}

func drawNode(w io.Writer, n *treeNode, branch string, frees map[manifest.SnapshotID]freed) {
	j := describe(n.Description)
	first := branch + j.SnapshotId
	switch {
	case n.State == snapshot.Pending:
		first += " " + j.State + " " + j.Progress
	case j.State != string(snapshot.Completed):
		first += " " + j.State
	}
	cells := []string{first, n.Start.Local().Format(time.DateTime), size(j.VolumeSizeBytes), "stored " + size(j.StoredBytes)}
	if frees != nil {
		told := ""
		if f, ok := frees[n.ID]; ok {
			told = f.String()
		}
		cells = append(cells, told)
	}
	name := oneLine(cmp.Or(n.Tags["Name"], n.Description.Description))
	if !n.Parent.IsZero() && (n.parent == nil || n.parent.ID != n.Parent) {
		name = strings.TrimSpace(name + " (parent " + n.Parent.String() + " is not listed)")
	}
	fmt.Fprintln(w, strings.TrimRight(strings.Join(append(cells, name), "\t"), "\t"))
}

// treesJSON is what 'snapshot tree --json' prints. It is not nested: tools that read JSON
// bound how deep, and a year of nights is a chain of 365.
type treesJSON struct {
	Lineages []lineageJSON
}

type lineageJSON struct {
	LineageId string
	Encrypted bool
	Snapshots []branchJSON
}

// branchJSON is a snapshot in a tree.
type branchJSON struct {
	snapshotJSON
	Below string `json:",omitempty"` // the nearest ancestor that is listed
}

// describeTrees describes trees, each from its roots on, a snapshot before those below it.
func describeTrees(trees []*lineageTree, frees map[manifest.SnapshotID]freed) treesJSON {
	all := treesJSON{Lineages: []lineageJSON{}}
	for _, t := range trees {
		l := lineageJSON{LineageId: t.id.String(), Encrypted: t.encryption != nil}
		var add func(siblings []*treeNode)
		add = func(siblings []*treeNode) {
			for _, n := range siblings {
				b := branchJSON{snapshotJSON: describe(n.Description)}
				if f, ok := frees[n.ID]; ok && f.unknown == "" {
					b.UniqueBytes = &f.bytes
				}
				if n.parent != nil {
					b.Below = n.parent.ID.String()
				}
				l.Snapshots = append(l.Snapshots, b)
				add(n.children)
			}
		}
		add(t.roots)
		all.Lineages = append(all.Lineages, l)
	}
	return all
}
