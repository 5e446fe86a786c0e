package blockstore_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
)

// cannedStore is a store on a server that answers every request alike.
func cannedStore(t *testing.T, prefix string, status int, header map[string]string, body string) blockstore.Store {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/xml")
		for name, value := range header {
			w.Header().Set(name, value)
		}
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}))
	t.Cleanup(server.Close)
	s, err := blockstore.NewS3(t.Context(), blockstore.S3Config{
		Bucket: "b", Prefix: prefix, Region: "us-east-1", Endpoint: server.URL,
		Credentials: credentials.NewStaticCredentialsProvider("AKIA", "secret", ""),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestReachTellsWhatCameBackAlsoWithARefusal(t *testing.T) {
	date := time.Date(2020, 2, 3, 4, 5, 6, 0, time.UTC)
	header := map[string]string{"Date": date.Format(http.TimeFormat), "X-Amz-Bucket-Region": "eu-west-1"}
	for name, c := range map[string]struct {
		status int
		body   string
		want   error
	}{
		"listed":       {200, `<ListBucketResult></ListBucketResult>`, nil},
		"refused":      {403, `<Error><Code>AccessDenied</Code></Error>`, blockstore.ErrDenied},
		"too skewed":   {403, `<Error><Code>RequestTimeTooSkewed</Code></Error>`, blockstore.ErrDenied},
		"no bucket":    {404, `<Error><Code>NoSuchBucket</Code></Error>`, blockstore.ErrNoStore},
		"other region": {301, `<Error><Code>PermanentRedirect</Code></Error>`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := cannedStore(t, "p", c.status, header, c.body)
			got, err := blockstore.Reach(t.Context(), s)
			if (err == nil) != (c.status == 200) || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%v", err)
			}
			if !got.Date.Equal(date) || got.Region != "eu-west-1" || got.Signed != "us-east-1" || got.AccessKey != "AKIA" || got.Took <= 0 {
				t.Errorf("%+v", got)
			}
		})
	}
	dir := t.TempDir()
	if _, err := blockstore.Reach(t.Context(), blockstore.NewDir(dir)); err != nil {
		t.Error(err)
	}
	if _, err := blockstore.Reach(t.Context(), blockstore.NewDir(dir+"/none")); !errors.Is(err, blockstore.ErrNoStore) {
		t.Error(err)
	}
}

func TestLifecycleTellsOfRulesThatConcernTheStore(t *testing.T) {
	expire := `<Expiration><Days>30</Days></Expiration>`
	rule := func(filter, status, what string) string {
		return `<Rule><ID>r</ID>` + filter + `<Status>` + status + `</Status>` + what + `</Rule>`
	}
	harm := blockstore.Lifecycle{Harms: []string{`rule "r" deletes objects after 30 days`}}
	none := blockstore.Lifecycle{}
	for name, c := range map[string]struct {
		rule string
		want blockstore.Lifecycle
	}{
		"all":           {rule(`<Filter></Filter>`, "Enabled", expire), harm},
		"above":         {rule(`<Filter><Prefix>some</Prefix></Filter>`, "Enabled", expire), harm},
		"old style":     {rule(`<Prefix>some/</Prefix>`, "Enabled", expire), harm},
		"below":         {rule(`<Filter><Prefix>some/prefix/data/</Prefix></Filter>`, "Enabled", expire), harm},
		"beside":        {rule(`<Filter><Prefix>other/</Prefix></Filter>`, "Enabled", expire), none},
		"disabled":      {rule(`<Filter></Filter>`, "Disabled", expire), none},
		"tagged":        {rule(`<Filter><Tag><Key>a</Key><Value>b</Value></Tag></Filter>`, "Enabled", expire), none},
		"tagged, also":  {rule(`<Filter><And><Prefix>some/</Prefix><Tag><Key>a</Key><Value>b</Value></Tag></And></Filter>`, "Enabled", expire), none},
		"of a size":     {rule(`<Filter><And><Prefix>some/</Prefix><ObjectSizeGreaterThan>5</ObjectSizeGreaterThan></And></Filter>`, "Enabled", expire), harm},
		"glacier":       {rule(`<Filter></Filter>`, "Enabled", `<Transition><Days>1</Days><StorageClass>GLACIER</StorageClass></Transition>`), blockstore.Lifecycle{Harms: []string{`rule "r" moves objects to GLACIER, where nothing can be read at once`}}},
		"cheaper":       {rule(`<Filter></Filter>`, "Enabled", `<Transition><Days>1</Days><StorageClass>GLACIER_IR</StorageClass></Transition>`), none},
		"old versions":  {rule(`<Filter></Filter>`, "Enabled", `<NoncurrentVersionExpiration><NoncurrentDays>1</NoncurrentDays></NoncurrentVersionExpiration>`), blockstore.Lifecycle{ExpiresOld: true}},
		"some versions": {rule(`<Filter><Prefix>some/prefix/data/</Prefix></Filter>`, "Enabled", `<NoncurrentVersionExpiration><NoncurrentDays>1</NoncurrentDays></NoncurrentVersionExpiration>`), none},
		"markers":       {rule(`<Filter></Filter>`, "Enabled", `<Expiration><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration>`), none},
	} {
		t.Run(name, func(t *testing.T) {
			s := cannedStore(t, "some/prefix", 200, nil, `<LifecycleConfiguration>`+c.rule+`</LifecycleConfiguration>`)
			got, err := blockstore.LifecycleOf(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	for code, want := range map[string]error{"NoSuchLifecycleConfiguration": nil, "AccessDenied": blockstore.ErrDenied} {
		s := cannedStore(t, "p", 403, nil, `<Error><Code>`+code+`</Code></Error>`)
		if l, err := blockstore.LifecycleOf(t.Context(), s); !errors.Is(err, want) || (err == nil) != (want == nil) || len(l.Harms) > 0 {
			t.Errorf("%s: %+v, %v", code, l, err)
		}
	}
	if _, err := blockstore.LifecycleOf(t.Context(), blockstore.NewDir("/x")); err != nil {
		t.Error(err)
	}
}
