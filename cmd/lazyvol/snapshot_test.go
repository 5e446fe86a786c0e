package main

import (
	"encoding/json"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// Snapshots have one data key if, and only if, they are of one lineage; one that
// was destroyed is no key, and both say which key wrapped it.
func TestEncryptedSnapshotsNameTheirKeys(t *testing.T) {
	encrypted := func(e *manifest.Encryption) snapshotJSON {
		return describe(snapshot.Description{State: snapshot.Completed, Encryption: e})
	}
	one := encrypted(&manifest.Encryption{KeyURI: "file:///key", WrappedKey: []byte("one")})
	same := encrypted(&manifest.Encryption{KeyURI: "file:///key", WrappedKey: []byte("one")})
	other := encrypted(&manifest.Encryption{KeyURI: "file:///key", WrappedKey: []byte("other")})
	if !one.Encrypted || one.KmsKeyId != "file:///key" || len(one.DataEncryptionKeyId) != 32 || one.StateMessage != "" {
		t.Errorf("described as %+v", one)
	}
	if one.DataEncryptionKeyId != same.DataEncryptionKeyId || one.DataEncryptionKeyId == other.DataEncryptionKeyId {
		t.Errorf("data keys %s and %s, and %s", one.DataEncryptionKeyId, same.DataEncryptionKeyId, other.DataEncryptionKeyId)
	}
	shredded := encrypted(&manifest.Encryption{KeyURI: "file:///key", Shredded: true})
	if !shredded.Encrypted || shredded.DataEncryptionKeyId != "" || shredded.StateMessage == "" {
		t.Errorf("shredded is described as %+v", shredded)
	}
	plain := encrypted(nil)
	if plain.Encrypted || plain.KmsKeyId != "" || plain.DataEncryptionKeyId != "" {
		t.Errorf("plain is described as %+v", plain)
	}
}

func TestCopiesHaveATransferType(t *testing.T) {
	for _, source := range []*manifest.CopySource{nil, {}} {
		data, err := json.Marshal(describe(snapshot.Description{CopiedFrom: source}))
		if err != nil {
			t.Fatal(err)
		}
		var j map[string]any
		if err := json.Unmarshal(data, &j); err != nil {
			t.Fatal(err)
		}
		if got, is := j["TransferType"]; is != (source != nil) || is && got != "standard" {
			t.Errorf("copied from %v: transfer type %v", source, got)
		}
	}
}
