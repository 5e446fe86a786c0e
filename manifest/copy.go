package manifest

// A LineageOrigin names the lineage, of this store or of another, whose snapshots a lineage holds
// copies of.
type LineageOrigin struct {
	Store   string    `json:"store"` // its id
	Lineage LineageID `json:"lineage"`
}

// A CopySource names the snapshot, of this store or of another, that a snapshot is a copy of.
type CopySource struct {
	Store    string     `json:"store"` // its id
	Snapshot SnapshotID `json:"snapshot"`
}

func (o *LineageOrigin) validate() error {
	if o == nil {
		return nil
	}
	if err := check(validNonce(o.Store), "store of its origin", o.Store); err != nil {
		return err
	}
	return check(o.Lineage != 0, "lineage of its origin", o.Lineage)
}

func (c *CopySource) validate() error {
	if c == nil {
		return nil
	}
	if err := check(validNonce(c.Store), "store that it was copied from", c.Store); err != nil {
		return err
	}
	return checkSnapshot(c.Snapshot)
}
