package blockstore

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// A Contact is what one small request tells of a store besides its answer.
type Contact struct {
	Asked time.Time     // when the request began, by this host's clock
	Took  time.Duration // until the whole answer was there, connecting included

	// Date is the store's clock as it answered, exact to a second; zero if the
	// store does not tell.
	Date time.Time

	// Region is where the bucket is, and Signed the region that requests are
	// signed for; "" is not known.
	Region, Signed string

	// AccessKey is the public half of the credentials, and Source where they were
	// found; "" for a folder.
	AccessKey, Source string
}

// Reach makes the smallest request there is, a listing of at most one object, and
// tells what came back, also of one that was refused: a Contact is filled as far as
// it is known beside an error. s makes single requests: it is as Open returned it.
func Reach(ctx context.Context, s Store) (Contact, error) {
	c := Contact{Asked: time.Now()}
	bucket, ok := s.(*s3Store)
	if !ok {
		err := s.List(ctx, "", func(Info) error { return errEnough })
		c.Took = time.Since(c.Asked)
		if errors.Is(err, errEnough) {
			err = nil
		}
		return c, err
	}
	options := bucket.client.Options()
	c.Signed = options.Region
	credentials, err := options.Credentials.Retrieve(ctx)
	if err != nil {
		return c, fmt.Errorf("%w: no AWS credentials: %w", ErrDenied, err)
	}
	c.AccessKey, c.Source = credentials.AccessKeyID, credentials.Source
	request, cancel := bucket.request(ctx, 0)
	defer cancel()
	c.Asked = time.Now()
	out, err := bucket.client.ListObjectsV2(request, &s3.ListObjectsV2Input{Bucket: &bucket.bucket, Prefix: &bucket.prefix, MaxKeys: aws.Int32(1)})
	c.Took = time.Since(c.Asked)
	var header http.Header
	if refused := (*awshttp.ResponseError)(nil); errors.As(err, &refused) && refused.Response != nil {
		header = refused.Response.Header
	} else if err == nil {
		if raw, ok := awsmiddleware.GetRawResponse(out.ResultMetadata).(*smithyhttp.Response); ok {
			header = raw.Header
		}
	}
	c.Region = header.Get("X-Amz-Bucket-Region")
	if date, err := http.ParseTime(header.Get("Date")); err == nil {
		c.Date = date
	}
	return c, opError("reach", s, "", s3Error(ctx, err, Condition{}))
}

// errEnough ends a listing.
var errEnough = errors.New("enough")

// A Lifecycle is what a bucket's rules do to the objects of a store by themselves.
type Lifecycle struct {
	// Harms are the rules that remove objects, or move them to where they cannot be
	// read at once, in words.
	Harms []string

	// ExpiresOld: old versions of objects that were deleted or replaced are removed.
	ExpiresOld bool
}

// LifecycleOf returns the rules of a store's bucket that concern it; those that are
// not enabled, or are for objects with tags, which a store has none of, do not. A
// folder has none. s makes single requests: it is as Open returned it.
func LifecycleOf(ctx context.Context, s Store) (Lifecycle, error) {
	var l Lifecycle
	bucket, ok := s.(*s3Store)
	if !ok {
		return l, nil
	}
	request, cancel := bucket.request(ctx, 0)
	defer cancel()
	out, err := bucket.client.GetBucketLifecycleConfiguration(request, &s3.GetBucketLifecycleConfigurationInput{Bucket: &bucket.bucket})
	if api := smithy.APIError(nil); errors.As(err, &api) && api.ErrorCode() == "NoSuchLifecycleConfiguration" {
		return l, nil
	}
	if err != nil {
		return l, opError("get the lifecycle of the bucket of", s, "", s3Error(ctx, err, Condition{}))
	}
	for _, rule := range out.Rules {
		prefix, all := rulePrefix(rule)
		concerns := strings.HasPrefix(bucket.prefix, prefix) || strings.HasPrefix(prefix, bucket.prefix)
		if rule.Status != types.ExpirationStatusEnabled || !all || !concerns {
			continue
		}
		if harm := harmOf(rule); harm != "" {
			l.Harms = append(l.Harms, fmt.Sprintf("rule %q %s", aws.ToString(rule.ID), harm))
		}
		old := rule.NoncurrentVersionExpiration
		l.ExpiresOld = l.ExpiresOld || old != nil && strings.HasPrefix(bucket.prefix, prefix)
	}
	return l, nil
}

// rulePrefix returns the prefix of the objects that a rule is for, and whether it is
// for those without tags.
func rulePrefix(rule types.LifecycleRule) (prefix string, untagged bool) {
	filter := rule.Filter
	switch {
	case filter == nil:
		//lint:ignore SA1019 rules made before 2016 have it
		return aws.ToString(rule.Prefix), true
	case filter.And != nil:
		return aws.ToString(filter.And.Prefix), len(filter.And.Tags) == 0
	}
	return aws.ToString(filter.Prefix), filter.Tag == nil
}

// harmOf tells what a rule does to objects that are there; "" is nothing.
func harmOf(rule types.LifecycleRule) string {
	switch e := rule.Expiration; {
	case e == nil:
	case e.Days != nil:
		return fmt.Sprintf("deletes objects after %d days", *e.Days)
	case e.Date != nil:
		return fmt.Sprintf("deletes objects on %s", e.Date.Format(time.DateOnly))
	}
	for _, t := range rule.Transitions {
		// What is in these has to be brought back by hand, which takes hours.
		if t.StorageClass == types.TransitionStorageClassGlacier || t.StorageClass == types.TransitionStorageClassDeepArchive {
			return fmt.Sprintf("moves objects to %s, where nothing can be read at once", t.StorageClass)
		}
	}
	return ""
}
